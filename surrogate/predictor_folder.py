"""A predictor's folder: what is written of a fitted predictor, and how it comes back.

`predictor.json` has the options, target names, fidelity and cost, `surrogate/` the fitted surrogate, `encoder-*/` the states
of encoders, `held_out.parquet` the scores that the fidelity was measured on, and `fitted_rows.*` what explanations need. The
folder appears under its name once it is complete.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from oracle import plugins
from oracle.artifacts import atomic_folder, provenance, read_json, write_json
from oracle.errors import MissingFileError
from surrogate.encoder_identity import as_options, load_encoders, save_encoders
from surrogate.fidelity import Fidelity
from surrogate.fitted_rows import FittedRows
from surrogate.scores import Scores

if TYPE_CHECKING:
    from oracle.language_model import LanguageModel
    from surrogate.predictor import InfluencePredictor

SURROGATES = "surrogate.models"
PREDICTOR_FILE = "predictor.json"
HELD_OUT_FILE = "held_out.parquet"
SURROGATE_FOLDER = "surrogate"


def write_predictor(predictor: InfluencePredictor, folder: Path) -> None:
    """Write a fitted predictor."""
    with atomic_folder(folder) as partial:
        if predictor.fitted_rows_ is not None:
            predictor.fitted_rows_.save(partial)
        predictor.surrogate_.save(partial / SURROGATE_FOLDER)
        predictor.held_out_.save(partial / HELD_OUT_FILE)
        write_json(
            partial / PREDICTOR_FILE,
            {
                "encoders": save_encoders(predictor.encoders, partial),
                "surrogate": predictor.surrogate_name,
                "options": predictor.surrogate_options,
                "num_folds": predictor.num_folds,
                "seed": predictor.seed,
                "target_names": predictor.target_names_,
                "units": predictor.units_,
                "fitted_text_ids": predictor.fitted_text_ids_,
                "fidelity": predictor.fidelity_.as_dict(),
                "cost": predictor.cost_,
                "provenance": provenance(),
            },
        )


def read_predictor(folder: Path, *, lm: LanguageModel | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a predictor's options, for its constructor, and its learned attributes by name.

    Raises:
        MissingFileError: There is no predictor in `folder`.
        MismatchError: An encoder's weights are not those that the predictor was fitted with.
    """
    if not (folder / PREDICTOR_FILE).exists():
        raise MissingFileError(
            f"there is no predictor in {folder}.",
            "a folder that InfluencePredictor.save wrote",
            "check the path, or fit first.",
        )
    stored = read_json(folder / PREDICTOR_FILE)
    surrogate: Any = plugins.load(SURROGATES, stored["surrogate"])
    options = {
        "encoder": load_encoders(stored["encoders"], folder, lm=lm),
        "surrogate": surrogate(**as_options(stored["options"])),
        "num_folds": stored["num_folds"],
        "seed": stored["seed"],
    }
    learned = {
        "surrogate_": surrogate.load(folder / SURROGATE_FOLDER),
        "held_out_": Scores.load(folder / HELD_OUT_FILE),
        "fitted_rows_": FittedRows.load(folder),
        "fidelity_": Fidelity.from_dict(stored["fidelity"]),
        "target_names_": stored["target_names"],
        "units_": stored["units"],
        "fitted_text_ids_": stored["fitted_text_ids"],
        "cost_": stored["cost"],
    }
    return options, learned
