"""usage: report.py SALES.csv DIRECTORY. Sums a table of sales by region and product."""

import csv
import json
import os
import sys
from collections import defaultdict


def read(path):
    """The sales, as (region, product, amount). Raises ValueError that names the line."""
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            line = 1 + int(row["day"])
            try:
                yield row["region"], row["product"], float(row["amount"])
            except ValueError:
                raise ValueError(f"line {line}: amount should be a number, not {row['amount']!r}") from None


def summarise(sales):
    regions, products = defaultdict(float), defaultdict(float)
    for region, product, amount in sales:
        regions[region] += amount
        products[product] += amount
    best = {"region": max(regions, key=regions.get), "product": max(products, key=products.get)}
    return {
        "sales": len(sales),
        "total": round(sum(regions.values()), 2),
        "regions": dict(sorted(regions.items())),
        "products": dict(sorted(products.items())),
        "best": best,
    }


def main():
    source, directory = sys.argv[1:]
    try:
        report = summarise(list(read(source)))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, "report.json"), "w") as file:
        json.dump(report, file, indent=2)
    with open(os.path.join(directory, "report.txt"), "w") as file:
        for title in ("regions", "products"):
            file.write(f"Sales by {title}\n\n")
            file.writelines(f"{name:<12}{amount:>10.2f}\n" for name, amount in report[title].items())
            file.write("\n")
    print(f"{report['sales']} sales, {report['total']:.2f} in all")
    return 0


sys.exit(main())
