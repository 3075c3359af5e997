"""Every error and warning of this library, by name.

Each class stands beside the code that raises it; this is their index. What the commands, the
demonstration and the Lightning callback raise is brought in when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

from ckpt_pass._errors import CkptPassError as CkptPassError
from ckpt_pass.compile.breaks import UncoveredBudgetWarning as UncoveredBudgetWarning
from ckpt_pass.compile.dry_run import DryRunError as DryRunError
from ckpt_pass.compile.engine import NotFunctionalError as NotFunctionalError
from ckpt_pass.compile.options import UnknownOptionError as UnknownOptionError
from ckpt_pass.compile.remembered import PlanCacheWarning as PlanCacheWarning
from ckpt_pass.compile.symbolic import BudgetExceededWarning as BudgetExceededWarning
from ckpt_pass.compile.tagging import ContradictoryTagsError as ContradictoryTagsError
from ckpt_pass.distributed.agreement import PlansDivergeError as PlansDivergeError
from ckpt_pass.distributed.exchange import NoProcessGroupError as NoProcessGroupError
from ckpt_pass.distributed.exchange import RankMissingError as RankMissingError
from ckpt_pass.distributed.pipeline import ScheduleError as ScheduleError
from ckpt_pass.distributed.together import RankFailedError as RankFailedError
from ckpt_pass.distributed.together import RanksDifferError as RanksDifferError
from ckpt_pass.drawing.figures import MissingExtraError as MissingExtraError
from ckpt_pass.eager.alike import ShardedStepsDifferError as ShardedStepsDifferError
from ckpt_pass.eager.alike import UnknownValuesError as UnknownValuesError
from ckpt_pass.eager.answers import OtherPathError as OtherPathError
from ckpt_pass.eager.compiled_parts import CompiledPartWarning as CompiledPartWarning
from ckpt_pass.eager.replicas import ReplicaError as ReplicaError
from ckpt_pass.graph.capture import FirstUseWarning as FirstUseWarning
from ckpt_pass.graph.capture import NothingToDifferentiateError as NothingToDifferentiateError
from ckpt_pass.graph.capture import NotTraceableError as NotTraceableError
from ckpt_pass.graph.capture import SeveralGraphsError as SeveralGraphsError
from ckpt_pass.graph.cost import SymbolicBytesError as SymbolicBytesError
from ckpt_pass.graph.kernel_cache import KernelCacheWarning as KernelCacheWarning
from ckpt_pass.graph.kernel_call import KernelError as KernelError
from ckpt_pass.graph.kernels import WorkspaceWarning as WorkspaceWarning
from ckpt_pass.graph.shapes import SizeError as SizeError
from ckpt_pass.job.counting import ForeignOptimizerError as ForeignOptimizerError
from ckpt_pass.job.counting import OptimizerFailedError as OptimizerFailedError
from ckpt_pass.job.jobs import InvalidJobError as InvalidJobError
from ckpt_pass.job.named import UnknownOptimizerError as UnknownOptimizerError
from ckpt_pass.job.totals import InfeasibleTotalError as InfeasibleTotalError
from ckpt_pass.job.totals import InvalidTotalError as InvalidTotalError
from ckpt_pass.measure.gradients import GradientMismatchError as GradientMismatchError
from ckpt_pass.measure.gradients import NoLossError as NoLossError
from ckpt_pass.measure.memory_profiler import NothingRecordedError as NothingRecordedError
from ckpt_pass.measure.memory_profiler import ProfilerInUseError as ProfilerInUseError
from ckpt_pass.measure.memory_profiler import SnapshotError as SnapshotError
from ckpt_pass.measure.step import MeasureArgumentError as MeasureArgumentError
from ckpt_pass.measure.step import UnknownParametersError as UnknownParametersError
from ckpt_pass.modules.applying import InactiveRegionsWarning as InactiveRegionsWarning
from ckpt_pass.modules.applying import SharedModuleError as SharedModuleError
from ckpt_pass.modules.applying import SharedModuleWarning as SharedModuleWarning
from ckpt_pass.modules.choice import NothingChosenError as NothingChosenError
from ckpt_pass.modules.choice import PlacementError as PlacementError
from ckpt_pass.modules.configs import ConfigKeyError as ConfigKeyError
from ckpt_pass.modules.estimate import EstimateArgumentError as EstimateArgumentError
from ckpt_pass.modules.layers.find import NoLayersError as NoLayersError
from ckpt_pass.modules.layers.profiling import ProfileError as ProfileError
from ckpt_pass.modules.optimal import LayerProfileError as LayerProfileError
from ckpt_pass.modules.placement import UnknownPlacementError as UnknownPlacementError
from ckpt_pass.modules.segments import SegmentCountError as SegmentCountError
from ckpt_pass.modules.sequential import NotSequentialError as NotSequentialError
from ckpt_pass.modules.training import AccumulationError as AccumulationError
from ckpt_pass.offloading.disk import StoreReadError as StoreReadError
from ckpt_pass.offloading.disk import StoreWriteError as StoreWriteError
from ckpt_pass.offloading.files import StoreFolderError as StoreFolderError
from ckpt_pass.offloading.graph_ops import LostStoreError as LostStoreError
from ckpt_pass.offloading.graph_ops import LostTicketError as LostTicketError
from ckpt_pass.offloading.layout import UnmovableTensorError as UnmovableTensorError
from ckpt_pass.offloading.options import InvalidOffloadError as InvalidOffloadError
from ckpt_pass.offloading.sharding import InvalidShardingError as InvalidShardingError
from ckpt_pass.offloading.sharding import ShardGroupError as ShardGroupError
from ckpt_pass.offloading.shards import ShardedValueDiffersError as ShardedValueDiffersError
from ckpt_pass.offloading.shards import ShardOrderError as ShardOrderError
from ckpt_pass.offloading.slots import StoreFullError as StoreFullError
from ckpt_pass.offloading.store import MovedValueChangedError as MovedValueChangedError
from ckpt_pass.offloading.workers import ForkedStoreError as ForkedStoreError
from ckpt_pass.ops.taxonomy import NotAnOpError as NotAnOpError
from ckpt_pass.planner.contract import UnsupportedProblemError as UnsupportedProblemError
from ckpt_pass.planner.device import InvalidDeviceError as InvalidDeviceError
from ckpt_pass.planner.devices import UnknownDeviceError as UnknownDeviceError
from ckpt_pass.planner.exact import ExactSolverError as ExactSolverError
from ckpt_pass.planner.link import InvalidLinkError as InvalidLinkError
from ckpt_pass.planner.moves import InvalidMoveError as InvalidMoveError
from ckpt_pass.planner.problem import InvalidProblemError as InvalidProblemError
from ckpt_pass.planner.solution import InfeasibleBudgetError as InfeasibleBudgetError
from ckpt_pass.planner.solvers import InvalidTimeLimitError as InvalidTimeLimitError
from ckpt_pass.planner.solvers import NoLinkSolverError as NoLinkSolverError
from ckpt_pass.planner.solvers import UnknownSolverError as UnknownSolverError
from ckpt_pass.planner.solvers import WrongSolutionError as WrongSolutionError
from ckpt_pass.plans.budget import InvalidBudgetError as InvalidBudgetError
from ckpt_pass.plans.curve import InvalidCurveError as InvalidCurveError
from ckpt_pass.plans.goal import MicrobatchesError as MicrobatchesError
from ckpt_pass.plans.goal import UnknownCostError as UnknownCostError
from ckpt_pass.plans.schema import PlanFileError as PlanFileError
from ckpt_pass.plans.signature import PlanMismatchError as PlanMismatchError
from ckpt_pass.policy.decisions import CompiledShardError as CompiledShardError
from ckpt_pass.policy.decisions import PolicyReturnError as PolicyReturnError
from ckpt_pass.policy.opinion import UnclassifiedOpWarning as UnclassifiedOpWarning
from ckpt_pass.policy.rules import InvalidRuleError as InvalidRuleError
from ckpt_pass.policy.rules import UnknownPolicyError as UnknownPolicyError
from ckpt_pass.regions.arguments import MutatedArgumentError as MutatedArgumentError
from ckpt_pass.regions.checkpointing import ContradictoryRegionError as ContradictoryRegionError
from ckpt_pass.regions.checkpointing import DeterminismCheckError as DeterminismCheckError
from ckpt_pass.regions.checkpointing import NoFunctionError as NoFunctionError
from ckpt_pass.regions.checkpointing import ReentrantRegionError as ReentrantRegionError
from ckpt_pass.regions.checkpointing import SavedHooksError as SavedHooksError
from ckpt_pass.regions.frame import TransformInRegionError as TransformInRegionError
from ckpt_pass.regions.outside import MutatedStateError as MutatedStateError
from ckpt_pass.regions.region import BackwardTwiceError as BackwardTwiceError
from ckpt_pass.regions.region import MutatedActivationError as MutatedActivationError
from ckpt_pass.regions.region import RecomputeMismatchError as RecomputeMismatchError
from ckpt_pass.regions.running import CompiledOffloadError as CompiledOffloadError
from ckpt_pass.regions.saved_values import EndedRecomputationError as EndedRecomputationError
from ckpt_pass.regions.wrapping import AlreadyAppliedError as AlreadyAppliedError
from ckpt_pass.regions.wrapping import NotAppliedError as NotAppliedError
from ckpt_pass.regions.wrapping import SegmentError as SegmentError
from ckpt_pass.regions.wrapping import UnknownRegionError as UnknownRegionError
from ckpt_pass.report.strategy_rows import UnknownStrategyError as UnknownStrategyError
from ckpt_pass.state.given import NotAModuleError as NotAModuleError
from ckpt_pass.state.holders import UninitializedParameterError as UninitializedParameterError
from ckpt_pass.state.objects import SpentIteratorError as SpentIteratorError
from ckpt_pass.state.wrapped import WrapperError as WrapperError
from ckpt_pass.steps.halves import LostValuesError as LostValuesError
from ckpt_pass.tools.ahead import PlanModeError as PlanModeError
from ckpt_pass.tools.arguments import StepArgumentError as StepArgumentError
from ckpt_pass.tools.axis import UnknownDimensionError as UnknownDimensionError
from ckpt_pass.tools.candidates import TuneArgumentError as TuneArgumentError
from ckpt_pass.tools.looking import NothingCompiledError as NothingCompiledError
from ckpt_pass.tools.strategies import StrategyError as StrategyError
from ckpt_pass.tools.sweeping import SweepArgumentError as SweepArgumentError
from ckpt_pass.tools.verification import NoRegionsError as NoRegionsError
from ckpt_pass.tools.verification import VerificationError as VerificationError

#: Where the errors are that come with an extra or a command.
_ELSEWHERE = {
    "CallbackArgumentError": "ckpt_pass.lightning",
    "FactoryError": "ckpt_pass.cli.factory",
    "LossDiffersError": "ckpt_pass.demo.results",
    "ModelSizeError": "ckpt_pass.demo.model",
}


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"ckpt_pass.errors has no error {name!r}")
    return getattr(importlib.import_module(_ELSEWHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_ELSEWHERE])
