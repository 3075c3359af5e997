"""Say how much memory you have; get the fastest training step that fits it.

This file is the index of the public interface; everything else is private.
"""

from torch.utils.checkpoint import CheckpointPolicy as CheckpointPolicy

from ckpt_pass import testing as testing
from ckpt_pass.budget import InvalidBudgetError as InvalidBudgetError
from ckpt_pass.compare import GradientComparison as GradientComparison
from ckpt_pass.compare import GradientMismatchError as GradientMismatchError
from ckpt_pass.compare import NoLossError as NoLossError
from ckpt_pass.compare import compare_gradients as compare_gradients
from ckpt_pass.compile.backend import Backend as Backend
from ckpt_pass.compile.backend import UnknownOptionError as UnknownOptionError
from ckpt_pass.compile.backend import ckpt_backend as ckpt_backend
from ckpt_pass.compile.backend import make_backend as make_backend
from ckpt_pass.compile.budgeting import WorkspaceWarning as WorkspaceWarning
from ckpt_pass.compile.engine import NotFunctionalError as NotFunctionalError
from ckpt_pass.compile.engine import PlanMismatchError as PlanMismatchError
from ckpt_pass.compile.replan import InductorPeakWarning as InductorPeakWarning
from ckpt_pass.compile.symbolic import BudgetExceededWarning as BudgetExceededWarning
from ckpt_pass.compile.tagging import ContradictoryTagsError as ContradictoryTagsError
from ckpt_pass.eager.region import BackwardTwiceError as BackwardTwiceError
from ckpt_pass.eager.region import MutatedActivationError as MutatedActivationError
from ckpt_pass.eager.region import RecomputeMismatchError as RecomputeMismatchError
from ckpt_pass.eager.sac import context_fn as context_fn
from ckpt_pass.eager.watch import RegionRecord as RegionRecord
from ckpt_pass.eager.watch import watch_regions as watch_regions
from ckpt_pass.errors import CkptPassError as CkptPassError
from ckpt_pass.explain import NothingCompiledError as NothingCompiledError
from ckpt_pass.explain import explain as explain
from ckpt_pass.explain import plan as plan
from ckpt_pass.explain import saved_activations as saved_activations
from ckpt_pass.fit import Fit as Fit
from ckpt_pass.fit import UnknownDimensionError as UnknownDimensionError
from ckpt_pass.fit import fit as fit
from ckpt_pass.goal import UnknownCostError as UnknownCostError
from ckpt_pass.graph.capture import NothingToDifferentiateError as NothingToDifferentiateError
from ckpt_pass.graph.capture import NotTraceableError as NotTraceableError
from ckpt_pass.graph.problem import SymbolicBytesError as SymbolicBytesError
from ckpt_pass.measure import MeasureArgumentError as MeasureArgumentError
from ckpt_pass.measure import Measurement as Measurement
from ckpt_pass.measure import UnknownParametersError as UnknownParametersError
from ckpt_pass.measure import measure_step as measure_step
from ckpt_pass.opinion import UnclassifiedOpWarning as UnclassifiedOpWarning
from ckpt_pass.ops import OpClass as OpClass
from ckpt_pass.ops import classify as classify
from ckpt_pass.ops import taxonomy_counts as taxonomy_counts
from ckpt_pass.plan import Decision as Decision
from ckpt_pass.plan import Plan as Plan
from ckpt_pass.plan import SavedActivation as SavedActivation
from ckpt_pass.plan import SavedActivations as SavedActivations
from ckpt_pass.planner.solution import InfeasibleBudgetError as InfeasibleBudgetError
from ckpt_pass.planner.solution import Solution as Solution
from ckpt_pass.planner.solution import evaluate as evaluate
from ckpt_pass.planner.solvers import InvalidTimeLimitError as InvalidTimeLimitError
from ckpt_pass.planner.solvers import UnknownSolverError as UnknownSolverError
from ckpt_pass.planner.solvers import WrongSolutionError as WrongSolutionError
from ckpt_pass.planner.solvers import solver_names as solver_names
from ckpt_pass.policies import as_policy as as_policy
from ckpt_pass.policies import policies as policies
from ckpt_pass.policy import FirstMatch as FirstMatch
from ckpt_pass.policy import InvalidRuleError as InvalidRuleError
from ckpt_pass.policy import Policy as Policy
from ckpt_pass.policy import PolicyReturnError as PolicyReturnError
from ckpt_pass.policy import Rule as Rule
from ckpt_pass.policy import TorchPolicy as TorchPolicy
from ckpt_pass.policy import UnknownPolicyError as UnknownPolicyError
from ckpt_pass.policy import first_match as first_match
from ckpt_pass.policy import recompute as recompute
from ckpt_pass.policy import rule as rule
from ckpt_pass.policy import save as save
from ckpt_pass.shapes import Dimension as Dimension
from ckpt_pass.shapes import SizeError as SizeError
from ckpt_pass.sites import CallSite as CallSite
from ckpt_pass.sites import SiteContext as SiteContext
from ckpt_pass.sweep import Sweep as Sweep
from ckpt_pass.sweep import SweepArgumentError as SweepArgumentError
from ckpt_pass.sweep import sweep as sweep
from ckpt_pass.sweep_report import SweepRow as SweepRow
from ckpt_pass.timeline import Timeline as Timeline

__version__ = "0.1.0"
