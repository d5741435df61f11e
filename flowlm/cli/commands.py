"""Every command of `flowlm`, in the order that help lists them."""

from flowlm.cli.bench import BENCH
from flowlm.cli.evaluate import COMPARE, EVALUATE
from flowlm.cli.exchange import EXPORT, IMPORT, INSPECT, PUSH
from flowlm.cli.plan import PLAN
from flowlm.cli.prepare import PREPARE, PREPARE_DATA, PREPARE_JUDGE, PREPARE_QM9
from flowlm.cli.sample import SAMPLE
from flowlm.cli.serve import SERVE
from flowlm.cli.study import REPORT, STUDY
from flowlm.cli.train import TRAIN

COMMANDS = (
    TRAIN,
    SAMPLE,
    SERVE,
    EVALUATE,
    COMPARE,
    PREPARE,
    PREPARE_DATA,
    PREPARE_JUDGE,
    PREPARE_QM9,
    STUDY,
    REPORT,
    EXPORT,
    PUSH,
    IMPORT,
    INSPECT,
    PLAN,
    BENCH,
)
