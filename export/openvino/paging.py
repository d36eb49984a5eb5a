"""Whether the pipeline's paged attention, which its speculative decoding needs, takes a graph."""

from __future__ import annotations

from pathlib import Path

from edgewright.errors import RecipeError
from edgewright.export.openvino.package import load


def check_paging(folder: Path, role: str) -> None:
    """Put a model's graph into the pipeline's form, as it does itself when it opens a pair; the file stays as it is.

    In traced graphs of one layer (GPT-2, OPT) it leaves the mask in use. A single model still runs, without pages.

    Raises:
        RecipeError: EW-833, it cannot be brought into that form.
    """
    model = load().Core().read_model(folder / "openvino_model.xml")
    try:
        load("openvino._offline_transformations").paged_attention_transformation(model)
    except RuntimeError as error:
        raise RecipeError(
            "EW-833",
            f"OpenVINO GenAI cannot draft with this {role}: its paged attention does not take the graph",
            where=role,
            expected="attention in the form that OpenVINO pages",
            found=" ".join(str(error).split()),
            fix="give it two layers, or export the pair to genai, gguf or hf",
        ) from None
