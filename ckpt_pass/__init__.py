"""Say how much memory you have; get the fastest training step that fits it.

This file is the index of the public interface; everything else is private.
"""

# ruff: noqa: I001  # in the order of the headings, not of the alphabet

from torch.utils.checkpoint import CheckpointPolicy as CheckpointPolicy

from ckpt_pass import errors as errors
from ckpt_pass import testing as testing
from ckpt_pass.version import __version__ as __version__

# --- Backends: torch.compile --------------------------------------------------------------
from ckpt_pass.compile.backend import Backend as Backend
from ckpt_pass.compile.backend import ckpt_backend as ckpt_backend
from ckpt_pass.compile.backend import make_backend as make_backend

# --- Eager: regions for torch.utils.checkpoint, and ours ----------------------------------
from ckpt_pass.regions.checkpointing import checkpoint as checkpoint
from ckpt_pass.regions.sac import context_fn as context_fn
from ckpt_pass.regions.watch import RegionRecord as RegionRecord
from ckpt_pass.regions.watch import watch_regions as watch_regions

# --- Policies: rules about ops, and what each op is ---------------------------------------
from ckpt_pass.policy.named import as_policy as as_policy
from ckpt_pass.policy.named import policies as policies
from ckpt_pass.policy.rules import FirstMatch as FirstMatch
from ckpt_pass.policy.rules import Policy as Policy
from ckpt_pass.policy.rules import Rule as Rule
from ckpt_pass.policy.rules import TorchPolicy as TorchPolicy
from ckpt_pass.policy.rules import first_match as first_match
from ckpt_pass.policy.rules import offload as offload
from ckpt_pass.policy.rules import recompute as recompute
from ckpt_pass.policy.rules import rule as rule
from ckpt_pass.policy.rules import save as save
from ckpt_pass.policy.sites import CallSite as CallSite
from ckpt_pass.policy.sites import SiteContext as SiteContext
from ckpt_pass.ops.taxonomy import OpClass as OpClass
from ckpt_pass.ops.taxonomy import classify as classify
from ckpt_pass.ops.taxonomy import taxonomy_counts as taxonomy_counts

# --- Offloading: values that are kept somewhere else --------------------------------------
from ckpt_pass.offloading.options import Offload as Offload
from ckpt_pass.offloading.saved_hooks import offload_activations as offload_activations

# --- Budgets and plans --------------------------------------------------------------------
from ckpt_pass.job.jobs import Job as Job
from ckpt_pass.planner.device import Device as Device
from ckpt_pass.plans.account import Account as Account
from ckpt_pass.plans.account import JobPhase as JobPhase
from ckpt_pass.plans.differences import plan_differences as plan_differences
from ckpt_pass.plans.parts import Decision as Decision
from ckpt_pass.plans.parts import SavedActivation as SavedActivation
from ckpt_pass.plans.parts import SavedActivations as SavedActivations
from ckpt_pass.plans.parts import Signature as Signature
from ckpt_pass.plans.step_plan import StepPlan as StepPlan
from ckpt_pass.plans.step_plan import load_plan as load_plan
from ckpt_pass.plans.timeline import Timeline as Timeline
from ckpt_pass.plans.value import Plan as Plan
from ckpt_pass.planner.solution import Solution as Solution
from ckpt_pass.planner.solution import evaluate as evaluate
from ckpt_pass.planner.solvers import solver_names as solver_names
from ckpt_pass.graph.shapes import Dimension as Dimension

# --- Placements: which modules are regions ------------------------------------------------
from ckpt_pass.modules.adapters import from_deepspeed as from_deepspeed
from ckpt_pass.modules.adapters import from_torchtitan as from_torchtitan
from ckpt_pass.modules.applying import applied as applied
from ckpt_pass.modules.applying import apply as apply
from ckpt_pass.modules.applying import is_checkpointed as is_checkpointed
from ckpt_pass.modules.applying import remove as remove
from ckpt_pass.modules.auto_memory import AutoMemory as AutoMemory
from ckpt_pass.modules.by_layer import AllLayers as AllLayers
from ckpt_pass.modules.by_layer import Alternate as Alternate
from ckpt_pass.modules.by_layer import ChosenLayers as ChosenLayers
from ckpt_pass.modules.by_layer import EveryN as EveryN
from ckpt_pass.modules.by_layer import NoLayers as NoLayers
from ckpt_pass.modules.by_module import Auto as Auto
from ckpt_pass.modules.by_module import ByName as ByName
from ckpt_pass.modules.by_module import Custom as Custom
from ckpt_pass.modules.by_module import HeavyOps as HeavyOps
from ckpt_pass.modules.choice import Choice as Choice
from ckpt_pass.modules.choice import ModuleChoice as ModuleChoice
from ckpt_pass.modules.choice import Placement as Placement
from ckpt_pass.modules.estimate import Estimate as Estimate
from ckpt_pass.modules.estimate import EstimateRow as EstimateRow
from ckpt_pass.modules.estimate import estimate_savings as estimate_savings
from ckpt_pass.modules.layers.find import Layers as Layers
from ckpt_pass.modules.layers.find import find_layers as find_layers
from ckpt_pass.modules.layers.layer_profile import LayerProfile as LayerProfile
from ckpt_pass.modules.layers.profiling import profile_layers as profile_layers
from ckpt_pass.modules.layers.skips import Skip as Skip
from ckpt_pass.modules.layers.skips import skip_values as skip_values
from ckpt_pass.modules.megatron import Megatron as Megatron
from ckpt_pass.modules.megatron import from_megatron as from_megatron
from ckpt_pass.modules.offloaded import Offloaded as Offloaded
from ckpt_pass.modules.offloaded import OffloadParts as OffloadParts
from ckpt_pass.modules.optimal import OptimalSegments as OptimalSegments
from ckpt_pass.modules.optimal import SegmentPlan as SegmentPlan
from ckpt_pass.modules.optimal import plan_segments as plan_segments
from ckpt_pass.modules.placement import as_placement as as_placement
from ckpt_pass.modules.placement import placements as placements
from ckpt_pass.modules.segments import Segments as Segments
from ckpt_pass.modules.segments import SqrtSegments as SqrtSegments
from ckpt_pass.modules.segments import optimal_segment_count as optimal_segment_count
from ckpt_pass.modules.segments import segment_boundaries as segment_boundaries
from ckpt_pass.modules.sequential import CheckpointedSequential as CheckpointedSequential
from ckpt_pass.modules.sequential import checkpoint_sequential as checkpoint_sequential
from ckpt_pass.modules.training import accumulate_gradients as accumulate_gradients
from ckpt_pass.modules.training import accumulation_windows as accumulation_windows

# --- Tools: what is called on a whole model -----------------------------------------------
from ckpt_pass.tools.ahead import explain as explain
from ckpt_pass.tools.ahead import plan as plan
from ckpt_pass.tools.ahead import saved_activations as saved_activations
from ckpt_pass.tools.fitting import Fit as Fit
from ckpt_pass.tools.fitting import fit as fit
from ckpt_pass.tools.strategies import Strategy as Strategy
from ckpt_pass.tools.strategies import as_strategy as as_strategy
from ckpt_pass.tools.strategies import compare_strategies as compare_strategies
from ckpt_pass.tools.sweeping import Sweep as Sweep
from ckpt_pass.tools.sweeping import sweep as sweep
from ckpt_pass.tools.verification import Check as Check
from ckpt_pass.tools.verification import Verdict as Verdict
from ckpt_pass.tools.verification import verify as verify

# --- Measuring a step ---------------------------------------------------------------------
from ckpt_pass.measure.gradients import GradientComparison as GradientComparison
from ckpt_pass.measure.gradients import compare_gradients as compare_gradients
from ckpt_pass.measure.memory_profiler import MemoryProfiler as MemoryProfiler
from ckpt_pass.measure.memory_profiler import MemoryRecord as MemoryRecord
from ckpt_pass.measure.memory_profiler import Phase as Phase
from ckpt_pass.measure.step import Measurement as Measurement
from ckpt_pass.measure.step import measure_step as measure_step
from ckpt_pass.report.page import write_report as write_report
from ckpt_pass.report.strategy_plots import plot_layers as plot_layers
from ckpt_pass.report.strategy_rows import StrategyRow as StrategyRow
from ckpt_pass.report.strategy_table import Comparison as Comparison
from ckpt_pass.report.sweeps import SweepRow as SweepRow

# --- Errors and warnings -------------------------------------------------------------------
from ckpt_pass.errors import AccumulationError as AccumulationError
from ckpt_pass.errors import AlreadyAppliedError as AlreadyAppliedError
from ckpt_pass.errors import BackwardTwiceError as BackwardTwiceError
from ckpt_pass.errors import BudgetExceededWarning as BudgetExceededWarning
from ckpt_pass.errors import CkptPassError as CkptPassError
from ckpt_pass.errors import CompiledOffloadError as CompiledOffloadError
from ckpt_pass.errors import ConfigKeyError as ConfigKeyError
from ckpt_pass.errors import ContradictoryRegionError as ContradictoryRegionError
from ckpt_pass.errors import ContradictoryTagsError as ContradictoryTagsError
from ckpt_pass.errors import DeterminismCheckError as DeterminismCheckError
from ckpt_pass.errors import DryRunError as DryRunError
from ckpt_pass.errors import EndedRecomputationError as EndedRecomputationError
from ckpt_pass.errors import EstimateArgumentError as EstimateArgumentError
from ckpt_pass.errors import ForeignOptimizerError as ForeignOptimizerError
from ckpt_pass.errors import ForkedStoreError as ForkedStoreError
from ckpt_pass.errors import GradientMismatchError as GradientMismatchError
from ckpt_pass.errors import InactiveRegionsWarning as InactiveRegionsWarning
from ckpt_pass.errors import InfeasibleBudgetError as InfeasibleBudgetError
from ckpt_pass.errors import InfeasibleTotalError as InfeasibleTotalError
from ckpt_pass.errors import InvalidBudgetError as InvalidBudgetError
from ckpt_pass.errors import InvalidDeviceError as InvalidDeviceError
from ckpt_pass.errors import InvalidJobError as InvalidJobError
from ckpt_pass.errors import InvalidLinkError as InvalidLinkError
from ckpt_pass.errors import InvalidMoveError as InvalidMoveError
from ckpt_pass.errors import InvalidOffloadError as InvalidOffloadError
from ckpt_pass.errors import InvalidRuleError as InvalidRuleError
from ckpt_pass.errors import InvalidTimeLimitError as InvalidTimeLimitError
from ckpt_pass.errors import InvalidTotalError as InvalidTotalError
from ckpt_pass.errors import LayerProfileError as LayerProfileError
from ckpt_pass.errors import LostStoreError as LostStoreError
from ckpt_pass.errors import LostTicketError as LostTicketError
from ckpt_pass.errors import LostValuesError as LostValuesError
from ckpt_pass.errors import MeasureArgumentError as MeasureArgumentError
from ckpt_pass.errors import MovedValueChangedError as MovedValueChangedError
from ckpt_pass.errors import MutatedActivationError as MutatedActivationError
from ckpt_pass.errors import MutatedArgumentError as MutatedArgumentError
from ckpt_pass.errors import MutatedStateError as MutatedStateError
from ckpt_pass.errors import NoLayersError as NoLayersError
from ckpt_pass.errors import NoLinkSolverError as NoLinkSolverError
from ckpt_pass.errors import NoLossError as NoLossError
from ckpt_pass.errors import NoRegionsError as NoRegionsError
from ckpt_pass.errors import NotAppliedError as NotAppliedError
from ckpt_pass.errors import NotFunctionalError as NotFunctionalError
from ckpt_pass.errors import NotSequentialError as NotSequentialError
from ckpt_pass.errors import NotTraceableError as NotTraceableError
from ckpt_pass.errors import NothingChosenError as NothingChosenError
from ckpt_pass.errors import NothingCompiledError as NothingCompiledError
from ckpt_pass.errors import NothingRecordedError as NothingRecordedError
from ckpt_pass.errors import NothingToDifferentiateError as NothingToDifferentiateError
from ckpt_pass.errors import OptimizerFailedError as OptimizerFailedError
from ckpt_pass.errors import OtherPathError as OtherPathError
from ckpt_pass.errors import PlacementError as PlacementError
from ckpt_pass.errors import PlanCacheWarning as PlanCacheWarning
from ckpt_pass.errors import PlanFileError as PlanFileError
from ckpt_pass.errors import PlanMismatchError as PlanMismatchError
from ckpt_pass.errors import PlanModeError as PlanModeError
from ckpt_pass.errors import PolicyReturnError as PolicyReturnError
from ckpt_pass.errors import ProfileError as ProfileError
from ckpt_pass.errors import ProfilerInUseError as ProfilerInUseError
from ckpt_pass.errors import RecomputeMismatchError as RecomputeMismatchError
from ckpt_pass.errors import ReentrantRegionError as ReentrantRegionError
from ckpt_pass.errors import SegmentCountError as SegmentCountError
from ckpt_pass.errors import SegmentError as SegmentError
from ckpt_pass.errors import SeveralGraphsError as SeveralGraphsError
from ckpt_pass.errors import SharedModuleError as SharedModuleError
from ckpt_pass.errors import SharedModuleWarning as SharedModuleWarning
from ckpt_pass.errors import SizeError as SizeError
from ckpt_pass.errors import SnapshotError as SnapshotError
from ckpt_pass.errors import SpentIteratorError as SpentIteratorError
from ckpt_pass.errors import StepArgumentError as StepArgumentError
from ckpt_pass.errors import StoreFolderError as StoreFolderError
from ckpt_pass.errors import StoreFullError as StoreFullError
from ckpt_pass.errors import StoreReadError as StoreReadError
from ckpt_pass.errors import StoreWriteError as StoreWriteError
from ckpt_pass.errors import StrategyError as StrategyError
from ckpt_pass.errors import SweepArgumentError as SweepArgumentError
from ckpt_pass.errors import SymbolicBytesError as SymbolicBytesError
from ckpt_pass.errors import TransformInRegionError as TransformInRegionError
from ckpt_pass.errors import UnclassifiedOpWarning as UnclassifiedOpWarning
from ckpt_pass.errors import UncoveredBudgetWarning as UncoveredBudgetWarning
from ckpt_pass.errors import UninitializedParameterError as UninitializedParameterError
from ckpt_pass.errors import UnknownCostError as UnknownCostError
from ckpt_pass.errors import UnknownDeviceError as UnknownDeviceError
from ckpt_pass.errors import UnknownDimensionError as UnknownDimensionError
from ckpt_pass.errors import UnknownOptimizerError as UnknownOptimizerError
from ckpt_pass.errors import UnknownOptionError as UnknownOptionError
from ckpt_pass.errors import UnknownParametersError as UnknownParametersError
from ckpt_pass.errors import UnknownPlacementError as UnknownPlacementError
from ckpt_pass.errors import UnknownPolicyError as UnknownPolicyError
from ckpt_pass.errors import UnknownRegionError as UnknownRegionError
from ckpt_pass.errors import UnknownSolverError as UnknownSolverError
from ckpt_pass.errors import UnknownStrategyError as UnknownStrategyError
from ckpt_pass.errors import UnmovableTensorError as UnmovableTensorError
from ckpt_pass.errors import VerificationError as VerificationError
from ckpt_pass.errors import WorkspaceWarning as WorkspaceWarning
from ckpt_pass.errors import WrongSolutionError as WrongSolutionError
