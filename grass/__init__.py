"""GRASS: gradient-based adaptive layer-wise importance sampling, as a torch optimizer.

from grass import Grass

opt = Grass(model, lr=2e-5, active_layers=4)
opt.probe(batches)                      # T_p batches, no update
for batch in loader:
    model(**batch).loss.backward()
    opt.step()
    opt.zero_grad()
"""

from grass.heatmap import plot
from grass.layers import LayerMap, find_layers
from grass.optimizer import Grass
from grass.options import Options
from grass.trace import History, Record, read_history, write_history

__all__ = [
    "Grass",
    "History",
    "LayerMap",
    "Options",
    "Record",
    "find_layers",
    "plot",
    "read_history",
    "write_history",
]
