"""Plans on several ranks: compared, made together, and for the stages of a pipeline."""

from ckpt_pass.distributed.agreement import (
    PlansDivergeError as PlansDivergeError,
)
from ckpt_pass.distributed.agreement import agree as agree
from ckpt_pass.distributed.exchange import NoProcessGroupError as NoProcessGroupError
from ckpt_pass.distributed.exchange import RankMissingError as RankMissingError
from ckpt_pass.distributed.pipeline import ScheduleError as ScheduleError
from ckpt_pass.distributed.pipeline import in_flight_of as in_flight_of
from ckpt_pass.distributed.together import RankFailedError as RankFailedError
from ckpt_pass.distributed.together import RanksDifferError as RanksDifferError
from ckpt_pass.distributed.together import plan_together as plan_together
from ckpt_pass.plans.goal import InFlight as InFlight
