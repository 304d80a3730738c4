"""A sweep in a notebook's manner: chunk sizes against request rates, as a table and as a picture.

python examples/sweep_and_plot.py [PICTURE.png]
"""

# %% What is varied
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd

import workbench
from traces import sample_path

CHUNKS = [256, 1024, 8192]
RATES = [4.0, 12.0, 36.0]

# %% One run a point: settings have the names of the flags
rows = []
for chunk in CHUNKS:
    for rate in RATES:
        record = workbench.simulate(sample_path(), requests=80, rate=rate, chunk=chunk, gpu="l40s")
        requests = pd.DataFrame(record.requests)  # columns are those of requests.csv: docs/run-record.md
        ttft_s = requests["first_token_s"] - requests["arrival_s"]
        tpot_s = (requests["finish_s"] - requests["first_token_s"]) / (requests["output_tokens"] - 1)
        rows.append({"chunk": chunk, "rate": rate, "ttft_p90": ttft_s.quantile(0.9), "tpot_p90": tpot_s.quantile(0.9)})

# %% The table
table = pd.DataFrame(rows)
print(table.pivot(index="chunk", columns="rate", values="ttft_p90").round(3).to_string())

# %% The picture
matplotlib.use("Agg")
figure, axes = plt.subplots(2, sharex=True, figsize=(7, 6))
for metric, axis in zip(("ttft_p90", "tpot_p90"), axes, strict=True):
    curves = table.pivot(index="rate", columns="chunk", values=metric)
    curves.plot(ax=axis, marker="o", ylim=(0, None), xlabel="requests a second", ylabel=f"{metric}, seconds")
target = Path(sys.argv[1] if len(sys.argv) > 1 else "sweep.png")
figure.savefig(target, dpi=150)
print(f"picture: {target}")
