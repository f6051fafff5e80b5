"""Applies the rules to one order: JSON in by standard input, JSON out. Exit code 2 for an order that is not one."""

import json
import operator
import os
import sys

COMPARE = {"==": operator.eq, ">=": operator.ge, "<=": operator.le}
MOST_PERCENT = 25


def load_rules(path):
    with open(path) as file:
        rules = json.load(file)
    for rule in rules:
        field, comparison, _ = rule["when"]
        assert isinstance(field, str), rule
        assert comparison in COMPARE, rule
        assert 0 < rule["percent"] <= 100, rule
    return rules


def applies(rule, order):
    field, comparison, value = rule["when"]
    return field in order and COMPARE[comparison](order[field], value)


def price(rules, order):
    applied = [rule for rule in rules if applies(rule, order)]
    percent = min(sum(rule["percent"] for rule in applied), MOST_PERCENT)
    total = round(order["total"] * (100 - percent) / 100, 2)
    return {"total": total, "percent": percent, "applied": [rule["name"] for rule in applied]}


def main():
    rules = load_rules(os.environ["RULES"])
    if "--check" in sys.argv:
        print(f"{len(rules)} rules")
        return 0
    order = json.load(sys.stdin)
    if not isinstance(order.get("total"), (int, float)):
        print("total should be a number", file=sys.stderr)
        return 2
    json.dump(price(rules, order), sys.stdout)
    return 0


sys.exit(main())
