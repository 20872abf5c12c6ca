"""Records made by hand, for what is said about them."""

ENVIRONMENT = {
    "smoke": False, "vit_fast": "0.1.0", "commit": "abc", "dirty": False, "python": "3.12", "torch": "2.13.0",
    "triton": "3.7.1",
    "date": "2026-01-02T03:04:05Z", "device": "Test CPU", "family": "1-2", "capability": "AVX2", "threads": 2,
    "instruction_set": "avx2", "driver": None,
}  # fmt: skip


def row(contender, ms, group="operation", op="layer_norm", direction="forward", shape="B/16@224 b1", spread=0.01, **more):
    found = {"group": group, "op": op, "variant": "", "direction": direction, "shape": shape, "dtype": "fp32"}
    found |= {
        "contender": contender,
        "ms": ms,
        "p20": ms * (1 - spread),
        "p80": ms * (1 + spread),
        "samples": 9,
        "method": "turns",
    }
    found |= {"checked": True, "floor_ms": 0.5 * ms, "of_ceiling": 0.5, "gb_s": 10.0, "tflop_s": 0.1}
    if group == "model":
        found["images_per_s"] = 1e3 * int(shape.rpartition(" b")[2]) / ms
    return found | more


def model(contender, ms, **more):
    return row(contender, ms, group="model", op="model", **more)


def record(rows, **environment):
    ceilings = {"copy_tb_s": 0.02, "products_tflop_s": {"fp32": 0.4}}
    data = {"format": 2, "environment": ENVIRONMENT | environment, "ceilings": ceilings, "rows": rows}
    return data | {"done": [], "skipped": [], "failed": []}
