"""Names of the Wan video autoencoders' tensors: as published and as ours, which are those of diffusers.

Both versions are published as lists of numbered layers. Wan2.1 numbers all layers of a path in one row, so where a
stage of its decoder begins is found from the names; Wan2.2 numbers the stages, and the layers within each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from soundstage.core.errors import WeightsError
from soundstage.models.weights import KeyMap, Source, renamed

_RENAMED = renamed(
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
    (r"^(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"\.downsamples\.(\d+)\.downsamples\.\d+\.(resample|time_conv)\.", r".down_blocks.\1.downsampler.\2."),
    (r"\.downsamples\.(\d+)\.downsamples\.(\d+)\.", r".down_blocks.\1.resnets.\2."),
    (r"\.downsamples\.", ".down_blocks."),
    (r"\.upsamples\.(\d+)\.upsamples\.\d+\.(resample|time_conv)\.", r".up_blocks.\1.upsampler.\2."),
    (r"\.upsamples\.(\d+)\.upsamples\.(\d+)\.", r".up_blocks.\1.resnets.\2."),
)
_ROW = re.compile(r"decoder\.upsamples\.(\d+)\.(?!upsamples\.)(.+)")


def wan_vae_keys(names: Sequence[str]) -> dict[str, Source]:
    """The key map of a file of either version, published or diffusers' (whose names stay as they are).

    Raises WeightsError when the file holds both forms of one tensor.
    """
    stage = _stage(names)
    found = {}
    for ours, source in _RENAMED(names).items():
        row = re.fullmatch(r"decoder\.upsamples\.(\d+)\.(.+)", ours)
        if row is not None:
            block, layer = divmod(int(row[1]), stage)
            inside = "upsamplers.0" if row[2].startswith(("resample.", "time_conv.")) else f"resnets.{layer}"
            ours = f"decoder.up_blocks.{block}.{inside}.{row[2]}"
        found[ours] = source
    return found


WAN_VAE_KEYS: KeyMap = wan_vae_keys


def _stage(names: Sequence[str]) -> int:
    """Layers in one stage of the Wan2.1 decoder: those up to and with the first that changes the size."""
    rows = [row for name in names if (row := _ROW.fullmatch(name))]
    ends = [int(row[1]) for row in rows if row[2].startswith("resample.")]
    return 1 + min(ends, default=max((int(row[1]) for row in rows), default=0))


def sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object]:
    """Widths, depth and strides by tensor names and shapes, as the arguments of WanVAEConfig.

    Raises WeightsError when they are not those of a Wan video autoencoder.
    """
    mine = {ours: tuple(shapes[source.names[0]]) for ours, source in wan_vae_keys(list(shapes)).items()}
    try:
        return _sizes(mine)
    except (KeyError, ValueError) as error:
        first = next(iter(shapes), "none")
        raise WeightsError(
            f"these {len(shapes)} tensors ({first}, ...) are not those of a Wan video autoencoder; give its file"
        ) from error


def _sizes(mine: Mapping[str, tuple[int, ...]]) -> dict[str, object]:
    width, pixels = mine["encoder.conv_in.weight"][:2]
    channels = mine["post_quant_conv.weight"][0]
    residual = "encoder.down_blocks.0.resnets.0.conv1.weight" in mine
    blocks = 1 + max(int(row[1]) for name in mine if (row := re.match(r"decoder\.up_blocks\.(\d+)\.", name)))
    depth = max(int(row[1]) for name in mine if (row := re.match(r"decoder\.up_blocks\.0\.resnets\.(\d+)\.", name)))
    row = depth + 1  # of the encoder's layers, where they are in one row
    first = "encoder.down_blocks.{}.resnets.0" if residual else "encoder.down_blocks.{}"
    pace = 1 if residual else row
    multipliers = tuple(mine[f"{first.format(i * pace)}.conv2.weight"][0] // width for i in range(blocks))
    ends = [f"{i}.downsampler" if residual else f"{i * row + depth}" for i in range(blocks - 1)]
    if any(f"encoder.down_blocks.{end}.resample.1.weight" not in mine for end in ends):
        raise ValueError("a stage does not halve")
    return {
        "channels": channels,
        "width": width,
        "decoder_width": mine["decoder.norm_out.gamma"][0] // multipliers[0],
        "multipliers": multipliers,
        "depth": depth,
        "temporal": tuple(f"encoder.down_blocks.{end}.time_conv.weight" in mine for end in ends),
        "patch": {3 * p * p: p for p in (1, 2, 4)}[pixels],
        "residual": residual,
    }
