"""Are these the encoders of the fit? What a predictor's folder keeps of its encoders, and what they are held against.

A folder has their names, options and fingerprints, and a folder for each with a state. A saved encoder comes back only if
it would give the features of the fit. Labels must be of the same checkpoint as features of the live model, and a
predictor goes on only from one that saw the same features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oracle import plugins
from oracle.errors import MismatchError
from surrogate.feature_cache import Encoder

if TYPE_CHECKING:
    from oracle.labels import Labels
    from oracle.language_model import LanguageModel

ENCODERS = "surrogate.features"


def save_encoders(encoders: Sequence[Encoder], folder: Path) -> list[dict[str, Any]]:
    """Write the states of encoders into `folder` and return their names, options and fingerprints."""
    entries = []
    for number, encoder in enumerate(encoders):
        if hasattr(encoder, "save_state"):
            encoder.save_state(_state_folder(folder, number))
        options = encoder.saved_options() if hasattr(encoder, "saved_options") else plugins.options_of(encoder)
        entries.append({"name": encoder.plugin_name, "options": options, "fingerprint": encoder.fingerprint()})
    return entries


def load_encoders(entries: Sequence[dict[str, Any]], folder: Path, *, lm: LanguageModel | None) -> list[Encoder]:
    """Make the encoders that `save_encoders` wrote.

    Args:
        entries: What `save_encoders` returned.
        folder: Where it wrote.
        lm: A model at hand, used where it is the one of the fit; else the model is loaded from the path it had.

    Raises:
        MismatchError: An encoder is not the one of the fit.
    """
    return [_load_encoder(entry, _state_folder(folder, number), lm=lm) for number, entry in enumerate(entries)]


def check_checkpoint(encoders: Sequence[Encoder], labels: Labels) -> None:
    """Refuse features of one checkpoint beside labels of another; a proxy is a model of another kind or size."""
    from oracle.measure import model_identity

    measured = labels.meta.get("model")
    for encoder in encoders:
        if measured is None or not encoder.needs_model:
            continue
        own = model_identity(encoder.lm)  # type: ignore[attr-defined]
        if own["kind"] == measured["kind"] and own["weights"] != measured["weights"]:
            raise MismatchError(
                f"the labels were measured at checkpoint {measured['weights']} of a {measured['kind']}, "
                f"the features are of its checkpoint {own['weights']}.",
                "labels and features of one checkpoint, or a proxy of another size",
                "label again at this checkpoint, use the checkpoint of the labels, or pass allow_stale=True.",
            )


def check_same_features(earlier: Sequence[Encoder], encoders: Sequence[Encoder]) -> None:
    """Refuse to go on from a surrogate of other features; a live model's features count as the same at any checkpoint."""
    given, accepted = (
        [encoder.key() if encoder.frozen else encoder.plugin_name for encoder in row] for row in (earlier, encoders)
    )
    if given != accepted:
        raise MismatchError(
            f"warm_start was fitted on features of {given}.",
            f"the encoders {accepted}",
            "use the encoders of the earlier predictor, or leave warm_start out.",
        )


def as_options(stored: dict[str, Any]) -> dict[str, Any]:
    """Return options as they were before JSON, which has no tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()}


def _state_folder(folder: Path, number: int) -> Path:
    return folder / f"encoder-{number}"


def _load_encoder(entry: dict[str, Any], folder: Path, *, lm: LanguageModel | None) -> Encoder:
    plugin: Any = plugins.load(ENCODERS, entry["name"])
    options = as_options(entry["options"])
    models = [lm] if lm is not None and not options.get("model") else [lm, None] if lm is not None else [None]
    found: list[str] = []
    for model in models:
        has_state = hasattr(plugin, "load_state")
        encoder: Encoder = plugin.load_state(folder, dict(options), lm=model) if has_state else plugin(**options)
        found.append(encoder.fingerprint())
        if found[-1] == entry["fingerprint"]:
            return encoder
    raise MismatchError(
        f"the encoder {entry['name']!r} has the fingerprint {' or '.join(found)}; "
        f"the predictor was fitted with {entry['fingerprint']}.",
        "the same weights and package versions as in the fit",
        "use the checkpoint and packages of the fit, or fit the predictor again.",
    )
