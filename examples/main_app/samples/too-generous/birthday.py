"""Ten percent off on birthdays."""

import json
import sys

order = json.load(sys.stdin)
if "birthday" in order:  # the mistake: it is always there, true or false
    order["total"] = order["total"] * 0.9
json.dump(order, sys.stdout)
