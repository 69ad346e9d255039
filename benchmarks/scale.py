"""What it costs to index, plan and poison billions of pairs, from rates that were measured: the tables of docs/scale.md.

    python benchmarks/scale.py [results/poison_throughput.json] [--pairs 5.8e9]
"""
import tyro

from mmbackdoor import stores
from mmbackdoor.recipe import command

CORES = 16
MACHINES = (1, 10, 100)
LINKS = {"10 Gbit/s": 1.25e9, "25 Gbit/s": 3.125e9, "100 Gbit/s": 12.5e9}
"""Bytes a second that one machine exchanges with the store, in each direction."""
RATES = (0.01, 0.001, 0.0001)


def time(seconds: float) -> str:
    """In the unit that suits."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.2g} s"


def size(n: float) -> str:
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n >= one:
            return f"{n / one:.3g} {unit}"
    return f"{n:.3g} B"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *rows))


def work(m: dict[str, float], pairs: float) -> list[list[str]]:
    """What each step reads, writes and computes."""
    data, index = pairs * m["bytes_per_pair"], pairs * m["index_bytes_per_pair"]

    def row(step: str, reads: float, writes: float, rate: float, n: float = pairs) -> list[str]:
        return [step, size(reads), size(writes), f"{n / rate / 3600:,.0f}"]

    copied, each = 1 / m["nothing_per_second"], 1 / m["poisons_per_second"]
    rows = [row("index, local tars", pairs * 2048, index, m["index_per_second"]),
            row("index, tars in a store", data, index, m["index_per_second"]),
            row("look for repeated keys", index, 0, m["check_per_second"]),
            row("plan", index, 0, m["plan_per_second"])]
    rows += [row(f"splice, {100 * r:g} % poisoned", data, data, 1 / (copied + r * each)) for r in RATES]
    rows += [row(f"patch set, {100 * r:g} % poisoned", r * data, r * data, m["poisons_per_second"], r * pairs) for r in RATES]
    return rows


def machines(m: dict[str, float], pairs: float, rate: float = 0.01) -> list[list[str]]:
    """What a link asks of a machine, and the time to splice everything, by machines and links, with what limits it."""
    data, each = pairs * m["bytes_per_pair"], 1 / m["nothing_per_second"] + rate / m["poisons_per_second"]
    seconds = pairs * each / CORES
    rows = [["cores that the link keeps busy", *(f"{link / m['bytes_per_pair'] * each:.1f}" for link in LINKS.values())]]
    for n in MACHINES:
        cells = []
        for link in LINKS.values():
            moving, working = data / link / n, seconds / n
            cells.append(f"{time(max(moving, working))} ({'store' if moving > working else 'cores'})")
        rows.append([f"{n} machines" if n > 1 else "1 machine", *cells])
    return rows


def main(record: tyro.conf.Positional[str] = "results/poison_throughput.json", pairs: float = 5.8e9) -> None:
    """Prints the tables.

    Args:
        record: What benchmarks/poison_throughput.py --record wrote.
        pairs: Size of the data set; 5.8e9 is LAION-5B's.
    """
    m = stores.read_json(record)
    print(table(["step", "reads", "writes", "core-hours"], work(m, pairs)))
    print()
    print(table([f"of {CORES} cores each, linked by", *LINKS], machines(m, pairs)))


if __name__ == "__main__":
    command(main)
