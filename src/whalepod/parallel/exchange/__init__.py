"""Token exchange: brings each token's row to the ranks that hold its experts, and the results back.

With expert parallelism every rank holds some experts and all tokens of its own, and a layer's rows have to
travel twice in each direction of a step. How they travel is a protocol behind `models.moe.Dispatcher`:

    flat      one all-to-all; a row for every pick
    two_hop   a row for every node that a token picks experts in, passed on within the node
              (DeepSeek-V3, section 3.2.2)

either with activations as they are on the wire, or in FP8 (`wire.py`). `trip.py` is what they share: the
legs there and back, and the overlap with the shared expert. Unless the layout names a protocol, it is
DeepEP on CUDA where that is installed, and two_hop elsewhere.
"""

from __future__ import annotations

from whalepod.models.moe import Dispatcher, LocalDispatcher
from whalepod.parallel.exchange import deepep
from whalepod.parallel.exchange.flat import Flat
from whalepod.parallel.exchange.trip import Exchange
from whalepod.parallel.exchange.two_hop import TwoHop
from whalepod.parallel.mesh import Mesh

__all__ = ["Exchange", "Flat", "TwoHop", "make_dispatcher"]


def make_dispatcher(mesh: Mesh) -> Dispatcher:
    """The dispatcher that the mesh's layout asks for; one serves all layers of a model."""
    layout = mesh.layout
    if layout.ep == 1:
        return LocalDispatcher()
    on_cuda = mesh.device.type == "cuda" and layout.precision != "fp32"
    if layout.exchange == "auto" and on_cuda and deepep.is_installed():
        return deepep.DeepEP(mesh["ep"], layout.wire)
    if layout.exchange == "flat":
        return Flat(mesh["ep"], layout.ep_node, layout.wire)
    # Also within one node, where it is one hop: a token goes to a rank once, whatever it picked there.
    return TwoHop(mesh["ep_rail"], mesh["ep_node"], layout.wire)
