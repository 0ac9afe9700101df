"""What a mixture of experts adds to its loss, so that its router spreads the tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from tnt_kernels.hf.models import base_of

#: Where the models of transformers 5.23 keep the factor on it.
_FACTORS = ("router_aux_loss_coef", "aux_loss_coef")


class Auxiliary(NamedTuple):
    term: Tensor  # what the model's own forward adds to its loss
    loss: Tensor  # the same without the factor


def auxiliary_loss(model: Any, outputs: Any) -> Auxiliary | None:
    """The auxiliary loss that ``model`` computes with ``output_router_logits=True``, and the model's own factor.

    Returns:
        None for a model that has none, or is not asked for it.

    Raises:
        ValueError: the configuration asks for one that the outputs do not hold, or the factor on it is not known.
    """
    names = [x for x in getattr(outputs, "__dataclass_fields__", ()) if x.endswith("aux_loss")]
    if not names:
        return None
    model = base_of(model)
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    if not any(getattr(x, "output_router_logits", False) for x in (config, text)):
        return None
    loss = getattr(outputs, names[0])
    factors = [getattr(x, name, None) for name in _FACTORS for x in (model, text, config)]
    known = [factor for factor in factors if isinstance(factor, (int, float))]
    if len(names) > 1 or not isinstance(loss, Tensor) or not known:
        raise ValueError(
            f"output_router_logits: True, but the forward of {type(model).__name__} gives no aux_loss of its own "
            f"accord, or there is no factor on it ({' or '.join(_FACTORS)}), so that it cannot be added to TNT's "
            "loss; expected output_router_logits=False"
        )
    return Auxiliary(known[0] * loss, loss)
