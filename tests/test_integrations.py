"""The tools that people train with: the same losses with our regions in them as without."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2LMHeadModel, TrainingArguments
from transformers import Trainer as HFTrainer

import ckpt_pass
from ckpt_pass.lightning import ActivationCheckpointing, CallbackArgumentError
from ckpt_pass.regions.wrapping import regions_of
from tests.zoo import hf
from tests.zoo.hf import text_ids

pytestmark = pytest.mark.filterwarnings("ignore")
POLICY = "save-matmul"
STEPS = 3


class Text(Dataset[dict[str, Tensor]]):
    """Real text, in pieces."""

    def __init__(self) -> None:
        self.ids = text_ids(8, 16)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model, _ = hf.gpt2()
    inner = model.model
    assert isinstance(inner, GPT2LMHeadModel)
    return inner.train()


def enable(model: Any) -> None:
    options = {"use_reentrant": False, "context_fn": ckpt_pass.context_fn(POLICY)}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


# --- Hugging Face ---------------------------------------------------------------------------


def trained_by_hugging_face(model: Any, folder: Path, **options: Any) -> list[float]:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4, logging_steps=1,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, seed=0, **options,
    )  # fmt: skip
    trainer = HFTrainer(model=model, args=arguments, train_dataset=Text())
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_hugging_face_trainer(tmp_path: Path) -> None:
    wanted = trained_by_hugging_face(gpt2(), tmp_path)
    assert len(wanted) == STEPS
    model = gpt2()
    with ckpt_pass.watch_regions() as records:
        got = trained_by_hugging_face(
            model,
            tmp_path,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={
                "use_reentrant": False,
                "context_fn": ckpt_pass.context_fn(POLICY),
            },
        )
    assert got == wanted
    assert len(records) == STEPS * len(model.transformer.h)


def test_hugging_face_trainer_with_an_applied_plan(tmp_path: Path) -> None:
    wanted = trained_by_hugging_face(gpt2(), tmp_path)
    model = gpt2()
    step = hf.TrainStep(model, hf.next_token_loss)
    plan = ckpt_pass.plan(step, text_ids(4, 16), budget=0.7, mode="eager")
    with plan.applied(step):
        assert trained_by_hugging_face(model, tmp_path) == wanted


# --- accelerate -----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("way", ["context_fn", "plan"])
def test_accelerate(precision: str, way: str) -> None:
    def losses(prepare: Callable[[Any], None]) -> list[float]:
        model = gpt2()
        prepare(model)
        AcceleratorState._reset_state(reset_partial_state=True)  # one a process otherwise
        accelerator = Accelerator(mixed_precision=precision, cpu=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model, optimizer = accelerator.prepare(model, optimizer)
        torch.manual_seed(0)
        found = []
        for _ in range(STEPS):
            ids = text_ids(4, 16)
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    def plan(model: Any) -> None:
        step = hf.TrainStep(model, hf.next_token_loss)
        ckpt_pass.plan(step, text_ids(4, 16), budget=0.8, mode="eager").apply(step)
        assert regions_of(model)

    assert losses(enable if way == "context_fn" else plan) == losses(lambda _: None)


# --- Lightning ------------------------------------------------------------------------------


class Lit(LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.model = gpt2()
        self.seen: list[float] = []
        self.regions: list[int] = []

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        ids = batch["input_ids"]
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        self.seen.append(loss.item())
        self.regions.append(len(regions_of(self)))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fitted(folder: Path, *callbacks: Any) -> Lit:
    module = Lit()
    trainer = Trainer(
        max_steps=STEPS, accelerator="cpu", devices=1, logger=False, default_root_dir=folder,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=list(callbacks),
    )  # fmt: skip
    torch.manual_seed(0)
    trainer.fit(module, DataLoader(Text(), batch_size=2))
    return module


def test_lightning(tmp_path: Path) -> None:
    wanted = fitted(tmp_path)
    module = fitted(tmp_path, ActivationCheckpointing(policy=POLICY))
    assert module.seen == wanted.seen
    assert module.regions == [len(module.model.transformer.h)] * STEPS
    assert not regions_of(module)
    assert list(module.state_dict()) == list(wanted.state_dict())


def test_lightning_with_chosen_modules_and_a_plan(tmp_path: Path) -> None:
    wanted = fitted(tmp_path).seen
    chosen = fitted(tmp_path, ActivationCheckpointing(modules=["model.transformer.h.1"]))
    assert chosen.seen == wanted and chosen.regions == [1] * STEPS

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = gpt2()

        def forward(self, ids: Tensor) -> Tensor:
            loss: Tensor = self.model(input_ids=ids, labels=ids).loss
            return loss

    plan = ckpt_pass.plan(Step(), text_ids(2, 16), budget=0.8, mode="eager")
    planned = fitted(tmp_path, ActivationCheckpointing(plan=plan))
    assert planned.seen == wanted and planned.regions == [len(plan.regions)] * STEPS
    with pytest.raises(CallbackArgumentError, match="one of the two"):
        ActivationCheckpointing(policy=POLICY, plan=plan)


def test_lightning_without_layers() -> None:
    with pytest.raises(ckpt_pass.NoLayersError, match="No layers were found in Linear"):
        ActivationCheckpointing().on_fit_start(None, nn.Linear(2, 2))


def test_lightning_with_a_placement(tmp_path: Path) -> None:
    wanted = fitted(tmp_path).seen
    module = fitted(tmp_path, ActivationCheckpointing(placement="layers-0"))
    assert module.seen == wanted and module.regions == [1] * STEPS
    assert not regions_of(module)
    with pytest.raises(CallbackArgumentError, match="one of the two"):
        ActivationCheckpointing(modules=["model"], placement="all")


# --- torchtitan's way -----------------------------------------------------------------------


def test_a_wrapper_around_each_layer() -> None:
    """As torchtitan's ``apply_ac`` does, over ``model.layers``."""
    model, args = hf.llama()
    wrapped = copy.deepcopy(model)
    layers = wrapped.model.model.layers
    for name, layer in layers.named_children():
        around = checkpoint_wrapper(
            layer,
            context_fn=ckpt_pass.context_fn(POLICY),
            preserve_rng_state=True,
            determinism_check="default",
        )
        layers.register_module(name, around)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted, got = _gradients(model, args), _gradients(wrapped, args)
    assert all(torch.equal(one, two) for one, two in zip(wanted, got, strict=True))


def _gradients(model: nn.Module, args: tuple[Tensor, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    model(*args).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]
