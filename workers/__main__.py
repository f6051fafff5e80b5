"""`python -m workers worker` plays runs; `python -m workers reaper` is the site's housekeeping."""

import os
import sys

if __name__ == "__main__":
    # Read by Celery while it is imported: SIGTERM starts the soft shutdown, which lets runs end before it kills them.
    os.environ["REMAP_SIGTERM"] = "SIGQUIT"
    from workers.app import start

    if sys.argv[1:] not in (["worker"], ["reaper"]):
        sys.exit("usage: python -m workers worker|reaper")
    sys.exit(start(sys.argv[1]))
