"""`mlpipes.compute.warm_driver`, which waits for a warm process however busy the machine is."""

import sys

from mlpipes.compute import warm_driver
from mlpipes_tests.waiting import LIMIT_SECONDS

if __name__ == "__main__":
    warm_driver._PATIENCE_SECONDS = LIMIT_SECONDS
    sys.exit(warm_driver.main(sys.argv[1:]))
