"""The data of the op taxonomy: names and patterns, no logic (that is in ``ops.py``).

A table maps the value of an ``OpClass`` to names separated by white space. A name is an op's base
name (``mm``), or namespace and base (``aten::mm``), or all three (``aten::where.default``). Base
names are those of the functional form: no trailing underscore, no ``_foreach_``, no ``special_``.
Facts come from the schemas and tags of torch 2.11, 2.13, 2.14 and 2.15.
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    """Names separated by white space, as a set."""
    return frozenset(text.split())


# Namespaces that belong to torch. An op of any other namespace is a custom op, about whose name
# nothing may be assumed.
BUILTIN_NAMESPACES: frozenset[str] = _names(
    """
    _c10d_functional _c10d_functional_autograd _dtensor _inductor_test _native _native_aot
    _quantized _test aten c10d c10d_functional coor debug_mode_ops debugprims export flex_gemm
    flex_lib fsdp higher_order inductor inductor_prims mempool mkl mkldnn mkldnn_prepacked onednn
    onnx onnx_symbolic prepacked prims profiler quantization quantized quantized_decomposed rngprims
    sparse static_runtime streams symm_mem torch_attn
    """
)

# Ops of other libraries that do what an aten op does, by the names that call sites carry. They have
# that op's class and call sites: the library takes one or the other, by what it runs under. The
# leading arguments are the same.
STANDS_FOR: dict[str, str] = {
    # the experts of a mixture, while dynamo compiles (transformers/integrations/moe.py)
    "transformers.grouped_mm_fallback.default": "aten._grouped_mm.default",
}

# Whole namespaces of one class.
COLLECTIVE_NAMESPACES: frozenset[str] = _names(
    "_c10d_functional _c10d_functional_autograd _dtensor c10d c10d_functional fsdp symm_mem"
)
EFFECTFUL_NAMESPACES: frozenset[str] = _names("debug_mode_ops debugprims mempool profiler streams")
QUANTISED_NAMESPACES: frozenset[str] = _names(
    "_quantized onednn quantization quantized quantized_decomposed"
)

# Names that a later rule would put into the wrong class. Quantised namespaces are exempt from the
# unqualified ones: `quantized::add` is not `aten::add`.
EXCEPTIONS: dict[str, str] = {
    "matmul": "einsum tensordot bilinear linalg_multi_dot linalg_vecdot",
    "attention": "_transformer_encoder_layer_fwd _native_multi_head_attention onnx::Attention",
    "pointwise": "linalg_cross cross onnx::RotaryEmbedding _saturate_weight_to_fp16",
    "reduction": "linalg_vector_norm linalg_norm _sparse_csr_sum _sparse_csr_prod",
    "normalisation": "norm_except_dim _batch_norm_impl_index",
    "view": "_unpack_dual prims::as_strided export::access_subclass_inner_tensor",
    "cast": """
        to _autocast_to_full_precision _autocast_to_reduced_precision convert_element_type
        prims::inductor_cvt_e8m0_rceil quantized_decomposed::convert_element_type
        """,
    "copy": """
        clone contiguous coalesce pin_memory resolve_conj resolve_neg _cudnn_rnn_flatten_weight
        _cslt_compress repeat_interleave _pad_packed_sequence quantized::make_quantized_cell_params
        quantized::make_quantized_cell_params_dynamic quantized::make_quantized_cell_params_fp16
        """,
    "creation": """
        empty_quantized _empty_affine_quantized _empty_per_channel_affine_quantized fft_fftfreq
        fft_rfftfreq prims::inductor_lookup_seed
        """,
    "indexing": "slice_scatter aten::where.default index",
    "pooling": "prims::_low_memory_max_pool_offsets_to_indices",
    "scan-sort": "linalg_vander",
    "linalg-fft": "lu_unpack",
    "effectful": """
        aten::_backward c10d::check_for_nan _linalg_check_errors set_data accumulate_grad
        resize_storage_bytes record_stream _propagate_xla_data get_gradients
        """,
    "metadata": """
        equal allclose _fused_sdp_choice _use_cudnn_ctc_loss _use_miopen_ctc_loss
        _use_cudnn_rnn_flatten_weight cudnn_is_acceptable _cufft_get_plan_cache_max_size
        _cufft_get_plan_cache_size _dtensor::mesh_get_process_group
        prepacked::unpack_prepacked_sizes_conv2d prepacked::unpack_prepacked_sizes_linear
        ckpt_pass::put ckpt_pass::release ckpt_pass::fetch ckpt_pass::take
        """,
    "multi-output-access": "static_runtime::VarTupleUnpack static_runtime::dict_unpack get_first",
    "quantised": "fbgemm_linear_quantize_weight _choose_qparams_per_tensor",
    "random": "_cudnn_init_dropout_state",
}

# Families by name: (rule, class, regular expression searched in the base name), in this order.
# They keep new members of a family classified in a torch that is newer than the tables.
NAME_PATTERNS: tuple[tuple[str, str, str], ...] = (
    ("backward-name", "backward", r"backward|_gamma_grad$|_dirichlet_grad$"),
    (
        "packed-parameter-name",
        "metadata",
        r"^conv\w*\dd_(\w*padding|stride|dilation|groups|transpose|unpack_sizes)$",
    ),
    # weights brought into a kernel's layout, or out of it again
    ("packing-name", "copy", r"prepack(_|$)|unpack(_|$)|(^|_)pack_|_to_int4pack|_reorder_"),
    ("attention-name", "attention", r"attention|_attn(_|$)"),
    ("recurrent-name", "recurrent", r"(^|_)(lstm|gru|rnn)(_|$)"),
    ("pooling-name", "pooling", r"(avg|max)_(un)?pool|upsample|grid_sampl|affine_grid"),
    ("convolution-name", "convolution", r"(^|_)q?conv(\d|_|$|olution)"),
    (
        "matmul-name",
        "matmul",
        r"(^|_)([a-z0-9]*mm|[a-z0-9]*matmul|q?linear|gemm|(add)?mv|v?dot|inner|trilinear)(_|$)",
    ),
)

# The same, after the quantised rules.
LATER_PATTERNS: tuple[tuple[str, str, str], ...] = (
    ("normalisation-name", "normalisation", r"(batch|layer|group|instance|rms|weight)_?norm"),
    ("softmax-name", "normalisation", r"softmax"),
    ("loss-name", "loss", r"loss|cross_entropy|kl_div"),
)

QUANTISED_PATTERN = r"quantize|quantized|qparams|fake_quant|moving_avg_obs|^int_repr$"

LINALG_FFT_PATTERN = r"^_?(linalg|fft)_"

# What tags and schemas leave open. Applied after the tag rules.
NAMES: dict[str, str] = {
    "matmul": "_cdist_forward cdist _euclidean_dist cov corrcoef",
    "pointwise": """
        _add_relu _conj_physical _foobar _masked_scale _prelu_kernel
        _test_autograd_multiple_dispatch _test_functorch_fallback _test_ambiguous_defaults
        _test_check_tensor _test_optional_filled_intlist _test_optional_floatlist
        _test_optional_intlist _test_parallel_materialize _test_serialization_subcmul
        _test_string_default _test_warn_in_autograd _transform_bias_rescale_qkv __and__ __or__
        __lshift__ __rshift__ abs absolute acos acosh add addcdiv addcmul addr arccos arccosh arcsin
        arcsinh arctan arctan2 arctanh asin asinh atan atan2 atanh bessel_i0 bessel_i0e bessel_i1
        bessel_i1e bessel_j0 bessel_j1 bitwise_and bitwise_or bitwise_xor cbrt ceil clamp_max
        clamp_min clamp_nan_to_num complex cos cosh digamma div divide eq erf erf_inv erfc erfcx
        erfinv exp exp2 expit expm1 fix floor floor_divide fmod frac frexp gammainc gammaincc
        gammaln gcd ge ger glu glu_jvp greater greater_equal gt hardswish i0 isclose isfinite isreal
        kron le leaky_relu lerp less less_equal lgamma log log10 log1p log2 log_sigmoid
        log_sigmoid_forward logit lt masked_fill maximum minimum mul multigammaln multiply ndtr
        ndtri ne neg negative not_equal outer polar polygamma pow prelu psi reciprocal remainder
        round rsqrt rsub shift_left shift_right_arithmetic sigmoid sign signed_log1p sin sinc sinh
        spherical_bessel_j0 sqrt sub subtract tan tanh tril triu true_divide trunc where xlogy zeta
        """,
    "reduction": """
        _aminmax _is_all_true _is_any_true _sparse_sum bincount cosine_similarity dist
        frobenius_norm hash_tensor histc histogram histogramdd _histogramdd_bin_edges
        _histogramdd_from_bin_cts _histogramdd_from_bin_tensors logsumexp max median nanmean
        nanmedian native_norm norm pairwise_distance pdist _pdist_forward powsum prod segment_reduce
        sum sum_to_size trace trapezoid trapz xor_sum
        """,
    "normalisation": "renorm",
    "view": """
        _add_batch_dim _remove_batch_dim _alloc_from_pool _reinterpret_tensor align_as align_tensors
        atleast_1d atleast_2d atleast_3d broadcast_tensors create_owned_ref data lift meshgrid
        """,
    "cast": """
        _cast_Byte _cast_Char _cast_Double _cast_Float _cast_Half _cast_Int _cast_Long _cast_Short
        _to_copy _to_cpu _to_dense _to_sparse _to_sparse_bsc _to_sparse_bsr _to_sparse_csc
        _to_sparse_csr _to_sparse_semi_structured _convert_indices_from_coo_to_csr
        _convert_indices_from_csr_to_coo chalf device_put to_copy to_dense to_maybe_copy_out
        to_mkldnn to_sparse to_sparse_bsc to_sparse_bsr to_sparse_csc to_sparse_csr type_as
        """,
    "copy": """
        _chunk_cat _coalesce _copy_from _copy_from_and_resize _jagged_to_padded_dense_forward
        _lazy_clone _mkldnn_reshape _mkldnn_transpose _nested_from_padded
        _nested_from_padded_and_nested_example _nested_from_padded_tensor _nested_tensor_from_mask
        _nested_tensor_from_tensor_list _pad_circular _pad_enum _padded_dense_to_jagged_forward
        _pin_memory _reshape_copy _reshape_from_tensor _sparse_semi_structured_apply
        _sparse_semi_structured_apply_dense _sparse_semi_structured_tile _stack block_diag
        cartesian_prod flex_gemm::to_blocked cat channel_shuffle col2im collapse column_stack
        combinations concat concatenate constant_pad_nd copy copy_sparse_to_sparse copy_strided diag
        diag_embed diagflat dstack expand_dims_copy fft_fftshift fft_ifftshift flatten_copy
        flatten_dense_tensors flip fliplr flipud fused_equally_split hstack im2col
        inductor_force_stride_order native_channel_shuffle nested_to_padded_tensor pad pad_sequence
        permute_copy pixel_shuffle pixel_unshuffle prims::copy_strided prims::reshape realize
        reflection_pad1d reflection_pad2d reflection_pad3d repeat replication_pad1d
        replication_pad2d replication_pad3d reshape_copy rev roll rot90 row_stack stack tile
        to_padded_tensor unflatten_dense_tensors unsafe_chunk unsafe_split unsafe_split_with_sizes
        vstack
        """,
    "creation": """
        _dim_arange _efficientzerotensor _new_zeros_with_same_feature_meta
        _nested_compute_contiguous_strides_offsets _nested_get_jagged_dummy _shape_as_tensor
        _sobol_engine_draw _spdiags _sparse_bsc_tensor_unsafe _sparse_bsr_tensor_unsafe
        _sparse_compressed_tensor_unsafe _sparse_compressed_tensor_with_dims
        _sparse_coo_tensor_unsafe _sparse_coo_tensor_with_dims
        _sparse_coo_tensor_with_dims_and_tensors _sparse_csc_tensor_unsafe _sparse_csr_tensor_unsafe
        arange bartlett_window blackman_window empty empty_like empty_permuted empty_strided eye
        fill full full_like hamming_window hann_window iota kaiser_window linspace logspace
        new_empty new_empty_strided new_full new_ones new_zeros ones ones_like range scalar_tensor
        sparse_bsc_tensor sparse_bsr_tensor sparse_compressed_tensor sparse_coo_tensor
        sparse_csc_tensor sparse_csr_tensor tril_indices triu_indices zero zeros zeros_like
        """,
    "indexing": """
        _embedding_bag _embedding_bag_forward_only _index_put_impl _rowwise_prune
        _sparse_mask_projection _unsafe_index _unsafe_index_put _unsafe_masked_index
        _unsafe_masked_index_put_accumulate argwhere as_strided_scatter diagonal_scatter embedding
        embedding_bag embedding_renorm gather index_add index_copy index_fill index_put index_reduce
        index_select masked_scatter masked_select nonzero nonzero_numpy nonzero_static one_hot put
        scatter scatter_add scatter_reduce select_scatter sparse_mask take take_along_dim
        zeros_and_scatter
        """,
    "scan-sort": """
        _cummax_helper _cummin_helper _logcumsumexp _unique _unique2 argsort bucketize cummax cummin
        cumprod cumsum cumulative_trapezoid diff gradient isin kthvalue logcumsumexp mode msort
        nanquantile quantile searchsorted sort topk unique_consecutive unique_dim
        unique_dim_consecutive vander
        """,
    "linalg-fft": """
        _cholesky_solve_helper _lu_with_info _spsolve cholesky cholesky_inverse cholesky_solve det
        geqrf inverse istft logdet lu_solve matrix_exp matrix_power nuclear_norm orgqr ormqr
        pinverse qr slogdet stft svd triangular_solve
        """,
    "random": """
        _philox_key_fold_in _philox_key_split _philox_normal _philox_randint _philox_uniform
        inductor_reserve_rng_state inductor_randint inductor_random
        """,
    "effectful": """
        _amp_foreach_non_finite_check_and_unscale _amp_update_scale _assert_async _assert_scalar
        _assert_tensor_metadata _coalesced _cufft_clear_plan_cache _cufft_set_plan_cache_max_size
        _functional_assert_async _functional_assert_scalar _functional_sym_constrain_range
        _functional_sym_constrain_range_for_size flex_gemm::autograd_not_implemented _fused_adagrad
        _fused_adam _fused_adamw _fused_sgd _make_dep_token _make_token _print _resize_output
        _sink_tokens _validate_compressed_sparse_indices _validate_sparse_bsc_tensor_args
        _validate_sparse_bsr_tensor_args _validate_sparse_compressed_tensor_args
        _validate_sparse_coo_tensor_args _validate_sparse_csc_tensor_args
        _validate_sparse_csr_tensor_args from_file resize resize_as resize_as_sparse retain_grad set
        sparse_resize sparse_resize_and_clear sym_constrain_range sym_constrain_range_for_size
        """,
    "metadata": """
        _debug_has_internal_overlap _dimI _dimV _has_compatible_shallow_copy_type
        _has_same_storage_numel _is_zerotensor _local_scalar_dense _nested_get_lengths
        _nested_get_max_seqlen _nested_get_min_seqlen _nested_get_offsets _nested_get_ragged_idx
        _nested_tensor_from_mask_left_aligned _nested_tensor_size _nested_tensor_storage_offsets
        _nested_tensor_strides _nnpack_available _nnz _version can_cast coor::current_device
        coor::current_device_index _native_aot::archs_topk _native_aot::covers_topk dense_dim dim
        get_device is_coalesced is_complex is_conj is_contiguous is_distributed is_floating_point
        is_inference is_leaf is_neg is_nonzero is_pinned is_same_size is_set_to is_signed
        is_vulkan_available item maximum_value minimum_value mkldnn::_get_mkldnn_serialized_md
        mkldnn::_is_mkldnn_acl_supported mkldnn::_is_mkldnn_bf16_supported
        mkldnn::_is_mkldnn_fp16_supported mkldnn::_nbytes mkldnn::data_ptr numel output_nr
        promote_types q_per_channel_axis q_per_channel_scales q_per_channel_zero_points q_scale
        q_zero_point qscheme result_type retains_grad size sparse_dim storage_offset stride
        sym_is_contiguous sym_numel sym_size sym_storage_offset sym_stride
        """,
    # Each stands for an op of another runtime of which only the name is known.
    "control": "onnx_symbolic::_symbolic onnx_symbolic::_symbolic_multi_out",
}

# Higher-order operators, by name. One that is not here is unclassified.
HIGHER_ORDER: dict[str, str] = {
    "matmul": "out_dtype flex_gemm",
    "attention": "flex_attention",
    "backward": "flex_attention_backward",
    "pointwise": "foreach_map inline_asm_elementwise",
    "random": """
        graphsafe_run_with_rng_state run_and_save_rng_state run_dtensor_rng_op run_with_rng_state
        """,
    "effectful": """
        _export_tracepoint call_torchbind print register_hook triton_kernel_wrapper_mutation
        with_effects
        """,
    "control": """
        associative_scan autograd_function_apply cond control_deps custom_function_call
        dynamo_bypassing_wrapper flat_apply hints_wrapper invoke_leaf_function invoke_quant
        invoke_quant_packed invoke_subgraph local_map_hop map_impl run_const_graph scan strict_mode
        switch tag_activation_checkpoint trace_wrapped while_loop while_loop_stack_output wrap
        wrap_activation_checkpoint wrap_with_autocast wrap_with_set_grad_enabled
        """,
    # Nothing is known of what they compute: a body compiled elsewhere, or any custom op.
    "unclassified": """
        aoti_call_delegate auto_functionalized auto_functionalized_v2 executorch_call_delegate
        inductor_compiled_code triton_kernel_wrapper_functional
        """,
}

# Python callables other than operators that FX graphs call, as ``module.name``. Arithmetic on
# sizes (`operator`, `math`, `torch.sym_*`) is told by the module.
PYTHON_CALLABLES: dict[str, str] = {
    "multi-output-access": "operator.getitem",
    "effectful": "torch._check torch._check_is_size torch._check_value torch._C._set_grad_enabled",
}

# Classes whose members do many operations for each byte they write, and those of which it is not
# known: a body (control), a custom op, a backward op that may hold a matmul.
EXPENSIVE: frozenset[str] = _names(
    "matmul convolution attention recurrent linalg-fft backward control unclassified"
)

# Ops whose output shape (or Python value) depends on the data, though no tag says so.
UNTAGGED_DATA_DEPENDENT: frozenset[str] = _names(
    """
    aten::_coalesce aten::_is_zerotensor aten::_to_sparse aten::_to_sparse_bsc aten::_to_sparse_bsr
    aten::_to_sparse_csc aten::_to_sparse_csr aten::coalesce aten::is_nonzero aten::nonzero_numpy
    aten::repeat_interleave.self_Tensor aten::to_sparse aten::where.default prims::item
    """
)

# Ops that update running statistics in place although their schema does not say so: `running_mean`
# and `running_var` are plain `Tensor?` arguments there, not `Tensor(a!)?`.
HIDDEN_MUTATIONS: frozenset[str] = _names(
    """
    aten::_batch_norm_impl_index aten::batch_norm aten::batch_norm_gather_stats
    aten::batch_norm_gather_stats_with_counts aten::batch_norm_update_stats aten::cudnn_batch_norm
    aten::instance_norm aten::miopen_batch_norm aten::native_batch_norm
    """
)

# Tagged `nondeterministic_seeded`, yet pure functions of their arguments: a backend is chosen, a
# softmax taken, the seed is an argument, or the backward reuses the forward's seed and offset.
TAGGED_BUT_STATELESS: frozenset[str] = _names(
    """
    aten::_cudnn_attention_backward aten::_cudnn_init_dropout_state aten::_fused_sdp_choice
    aten::_nested_tensor_softmax_with_shape aten::_scaled_dot_product_cudnn_attention_backward
    aten::_scaled_dot_product_efficient_attention_backward rngprims::philox_rand
    """
)

# Advance a generator without a tag.
UNTAGGED_RANDOM: frozenset[str] = _names(
    """
    inductor_prims::inductor_reserve_rng_state higher_order::graphsafe_run_with_rng_state
    higher_order::run_and_save_rng_state higher_order::run_dtensor_rng_op
    """
)

# Draw even at p == 0 (measured on CPU: the generator's state moves; the values do not matter, but
# every later draw does), or have a `p` that is the probability to keep.
DRAWS_AT_ZERO: frozenset[str] = frozenset(("aten::native_dropout", "aten::_fused_dropout"))
