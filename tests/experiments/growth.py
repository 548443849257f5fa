"""What grows: seconds and peak memory of a step against batch, length, layers and vocabulary.

    python tests/experiments/growth.py

Each of the four takes three values, the others staying as they are (BASE), on GPTs of random weights 256
wide. A training step is one of sft.py, with AdamW, on batch x length tokens; decoding reads length / 2 tokens
and writes as many. The exponent is the slope of the three points on a log-log line: 1 is linear. Beside it
stands what the operations grow with at most: attention is quadratic in the length, all else is linear, and
what does not grow pulls the slope down. Each point has a process of its own, so that its peak memory is its
own: on the CPU what Linux counts, less what there was before the model; on a GPU what torch allocated.

Leaves --out/growth.json, and prints a table in Markdown.
"""
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
import bench   # noqa: E402
from data import write_json   # noqa: E402
from data.flags import ToolFlags, program   # noqa: E402
from data.setup import setup   # noqa: E402

BASE = {"batch": 4, "length": 256, "layers": 4, "vocabulary": 8192}
VALUES = {"batch": (4, 12, 36), "length": (64, 256, 1024), "layers": (1, 4, 16),
          "vocabulary": (2048, 8192, 32768)}
AT_MOST = {"batch": 1, "length": 2, "layers": 1, "vocabulary": 1}      # exponents of the operations
WORK = {"training step": bench.sft_work, "decoding": bench.sample_work}


@dataclass
class Config(ToolFlags):
    """The flags of `python tests/experiments/growth.py`."""
    # The run itself
    out: str = "out/growth"       # folder for growth.json


def measure(kind, point, flags):
    """{"seconds", "mb", "device"} of one point {batch, length, layers, vocabulary}: the least of three
    rounds, the peak of all. To be called in a new process."""
    cfg = bench.Config(batch=point["batch"], length=point["length"], prompt=point["length"] // 2,
                       new=point["length"] // 2, **flags)
    device = setup(cfg)
    bench.SHAPES["point"] = dict(n_layer=point["layers"], n_head=4, n_kv_head=4, n_embd=256, n_inner=1024,
                                 head_dim=64, max_len=point["length"], vocab_size=point["vocabulary"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work = WORK[kind]("point", cfg, device)
    work.go()
    seconds = bench.least(work.go, device, calls=3)
    if device.type == "cuda":
        return {"seconds": seconds, "mb": torch.cuda.max_memory_allocated() / 1e6,
                "device": torch.cuda.get_device_name(device)}
    mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "mb": mb, "device": f"{cpu_name()}, threads: {torch.get_num_threads()}"}


def cpu_name():
    """The processor, as Linux calls it."""
    found = Path("/proc/cpuinfo")
    for line in found.read_text().splitlines() if found.exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return "CPU"


def exponent(xs, ys):
    """The slope of a line through the points on log-log axes."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def main(cfg):
    """All points; then the table."""
    flags = {"seed": cfg.seed, "device": cfg.device, "dtype": cfg.dtype}
    known, table, device = {}, [], ""
    for kind in WORK:
        for what, values in VALUES.items():
            points = []
            for value in values:
                point = BASE | {what: value}
                key = (kind, *point.values())
                if key not in known:     # what all four share is measured once
                    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                        known[key] = pool.submit(measure, kind, point, flags).result()
                    print(f"... {kind}, {point}: {known[key]['seconds']:.3f} s", flush=True)
                points.append(known[key])
            row = {"kind": kind, "what": what, "values": values}
            for name in ("seconds", "mb"):
                row[name] = [point[name] for point in points]
                row[f"{name}_exponent"] = exponent(values, row[name])
            table.append(row)
            device = points[0]["device"]

    print(f"\n{device}; {BASE} but for what grows\n")
    print("| | grows | values | seconds | exponent | peak MB | exponent | operations, at most |")
    print("|---|---|---|---|---|---|---|---|")
    for row in table:
        cells = [row["kind"], row["what"], ", ".join(map(str, row["values"]))]
        cells += [", ".join(f"{x:.3f}" for x in row["seconds"]), f"{row['seconds_exponent']:.2f}"]
        cells += [", ".join(f"{x:.0f}" for x in row["mb"]), f"{row['mb_exponent']:.2f}"]
        print(f"| {' | '.join(cells)} | {AT_MOST[row['what']]} |")
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    write_json(Path(cfg.out) / "growth.json", {"device": device, "rows": table})


if __name__ == "__main__":
    program(main, Config, __doc__)
