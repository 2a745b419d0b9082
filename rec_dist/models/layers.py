"""The decoder layers of a language model, whatever its family calls them."""

from typing import Any

from torch import Tensor, nn


def decoder_layers(module: nn.Module) -> list[nn.Module]:
    """The decoder layers of the language model in `module`, in the order of the forward pass; [] if there is none.

    They are the outermost list of as many modules as the model's configuration counts layers.
    """
    model = _language_model(module)
    if model is None:
        return []
    number = model.config.num_hidden_layers
    lists = (part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == number)
    return list(next(lists, ()))


def require_gradients_of_inputs(module: nn.Module) -> None:
    """Makes the rows that enter the first decoder layer of the language model in `module` require gradients.

    Needed where a hook waits for the gradient of a layer's input: with a frozen embedding the first layer's has none.
    Cost: the gradient of one layer's input.
    """
    model = _language_model(module)
    assert model is not None
    model.get_input_embeddings().register_forward_hook(_requires_gradient)


def _requires_gradient(_: nn.Module, __: Any, output: Tensor) -> None:
    output.requires_grad_(True)


def _language_model(module: nn.Module) -> Any:
    """The outermost module with a transformers configuration that counts layers, or None."""
    return next((part for part in module.modules() if getattr(getattr(part, "config", None), "num_hidden_layers", None)), None)
