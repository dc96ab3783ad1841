"""Cost of a step: bytes of each exchange, and seconds on a network and a core.

    >>> import ef_horovod as ef
    >>> ef.cost.gather_traffic(100, n=5).sent
    400

docs/cost-model.md has the formulas and the measurements.
"""

from ef_horovod.cost.model import Cost, half_precision_cost, possible_exchanges, step_cost
from ef_horovod.cost.traffic import (
    break_even_density,
    break_even_ranks,
    method_traffic,
    traffic,
)
from ef_horovod.exchange.network import Network, Software, Work
from ef_horovod.exchange.traffic import (
    Traffic,
    dense_traffic,
    double_pass_traffic,
    gather_traffic,
    reduce_traffic,
    server_traffic,
)

__all__ = [
    "Cost",
    "Network",
    "Software",
    "Traffic",
    "Work",
    "break_even_density",
    "break_even_ranks",
    "dense_traffic",
    "double_pass_traffic",
    "gather_traffic",
    "half_precision_cost",
    "method_traffic",
    "possible_exchanges",
    "reduce_traffic",
    "server_traffic",
    "step_cost",
    "traffic",
]
