"""Trunks of torchvision and timm by their names there, without their classifiers."""

import copy
import functools

import torch
import torchvision
from torch import Tensor, nn

from common.distributed import RunError


def names(library: str) -> list[str]:
    """All trunks of "torchvision" or "timm", with the library before them.

    Raises:
        RunError: timm is not installed.
    """
    if library == "torchvision":
        found = torchvision.models.list_models(module=torchvision.models)
    else:
        try:
            import timm
        except ImportError as error:
            raise RunError("timm:NAME: timm is not installed; pip install timm") from error
        found = timm.list_models()
    return [f"{library}:{name}" for name in found]


def build(arch: str, in_chans: int, image_size: int | tuple[int, int]) -> nn.Module:
    """Build `torchvision:NAME` or `timm:NAME` with its own start values, without its classifier.

    It keeps the library's names of tensors, and has two attributes beside `num_features`:
    `foreign`, which is `arch`, and `classifier_names`, of what its files hold and it does not.
    Stochastic depth is the model's default, which often is some.
    """
    library, _, name = arch.partition(":")
    if library == "timm":
        import timm

        make = functools.partial(timm.create_model, name, num_classes=0, in_chans=in_chans)
        model = first_accepted(
            arch, image_size, make, dict(img_size=image_size, dynamic_img_size=True),
            dict(img_size=image_size), {})
        names = model.default_cfg["classifier"] or ()
        model.classifier_names = (names,) if isinstance(names, str) else tuple(names)
        take_activations_out(model)
    else:
        sides = (image_size, image_size) if isinstance(image_size, int) else image_size
        make = functools.partial(torchvision.models.get_model, name)
        model = first_accepted(arch, image_size, make, dict(image_size=image_size),
                               dict(input_size=sides), {})
        take_classifier_off(model, arch)
        if in_chans != 3:
            change_channels(model, in_chans)
    model.foreign, model.sizes = arch, set()
    model.num_features = check_sizes(model, in_chans, {image_size})
    return model


def first_accepted(arch: str, image_size, make, *options: dict):
    """Call a function that makes a model with the first options that it knows; the last are none.

    Raises:
        RunError: it knows them, and they do not fit.
    """
    for each in options:
        try:
            return make(**each)
        except TypeError:  # an option that it does not know
            if not each:
                raise
        except Exception as error:  # a size that does not fit raises whatever a model likes
            raise RunError(refusal(arch, image_size, error)) from error


def take_activations_out(model: nn.Module) -> None:
    """Make timm's batch norms with an activation inside plain ones with the activation behind.

    So another batch norm can take their place. The names of tensors stay.
    """
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer._modules.keys() == {"drop", "act"}:
            layer.__class__ = nn.BatchNorm2d
            layer.register_forward_hook(lambda layer, _, x: layer.act(layer.drop(x)))


def take_classifier_off(model: nn.Module, arch: str) -> None:
    """Make a torchvision model end before its last linear layer, and the dropout beside it."""
    linear = [(name, layer) for name, layer in model.named_modules()
              if isinstance(layer, nn.Linear)]
    name, last = linear[-1] if linear else ("", None)
    if last is None or last.out_features != 1000:
        raise RunError(f"{arch} does not end in a linear classifier; choose another trunk")
    parent = model.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], nn.Identity())
    for layer in parent.children():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    model.classifier_names = (name,)


@torch.no_grad()
def change_channels(model: nn.Module, in_chans: int) -> None:
    """Give a model a first convolution for so many channels, with weights of the same spread."""
    name, old = next((name, layer) for name, layer in model.named_modules()
                     if isinstance(layer, nn.Conv2d))
    new = nn.Conv2d(in_chans, old.out_channels, old.kernel_size, old.stride, old.padding,
                    bias=old.bias is not None)
    new.weight.normal_().mul_(old.weight.std())
    if old.bias is not None:
        new.bias.copy_(old.bias)
    parent, _, place = name.rpartition(".")
    setattr(model.get_submodule(parent), place, new)


def check_sizes(backbone: nn.Module, in_chans: int, sizes: set) -> int | None:
    """Check that another library's trunk takes images of all sizes, without computing anything.

    Args:
        sizes: sides in pixels, or (height, width).

    Returns:
        The width of its features.

    Raises:
        RunError: images of a size do not pass, or what comes out is not features (N, D).
    """
    width = getattr(backbone, "num_features", None)
    for size in sizes - backbone.sizes if hasattr(backbone, "foreign") else ():
        sides = (size, size) if isinstance(size, int) else size
        try:
            shadow = copy.deepcopy(backbone).to("meta").train()
            features = shadow(torch.empty(2, in_chans, *sides, device="meta"))
        except Exception as error:
            raise RunError(refusal(backbone.foreign, size, error)) from error
        if not isinstance(features, Tensor) or features.ndim != 2:
            raise RunError(f"{backbone.foreign} gives no features (N, D); choose another trunk")
        backbone.sizes |= {size, sides}
        width = features.shape[1]
    return width


def refusal(arch: str, image_size: int | tuple[int, int], error: Exception) -> str:
    reason = str(error).partition("\n")[0].rstrip(".")
    sides = "x".join(map(str, image_size)) if isinstance(image_size, tuple) else image_size
    return (f"{arch} does not take images of {sides} px ({reason}); try another size, as a rule a "
            "larger one or a multiple of 32")
