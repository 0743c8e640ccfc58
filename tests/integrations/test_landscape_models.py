"""Landscapes of models with experts, Conv1D, embeddings and convolutions under adapters."""

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")

from test_model_kinds import make, make_own
from tiny import bits, same_bits

from flatkern import landscape

CASES = [(make, "gpt-oss"), (make, "GPT-2"), (make, "ViT"), (make, "CLIP")]
CASES += [(make_own, "Mixtral"), (make_own, "GPT-2")]


@pytest.mark.parametrize(("make", "name"), CASES, ids=[f"{m.__name__}-{n}" for m, n in CASES])
def test_the_point_is_that_of_the_moved_weights(make, name):
    model, batch, noise, _ = make(name, "virtual")
    before = bits(model)
    plane = landscape.Plane(model, seed=1)
    # The same weights that windows show, and each of them moves.
    assert set(plane.names) == set(noise.names)

    def loss():
        return model(**batch).loss

    found = landscape.surface_1d(model, loss, points=3, radius=0.3, plane=plane)
    assert same_bits(bits(model), before)
    directions = {name: plane.direction(model, name, 0) for name in plane.names}
    assert all(direction.abs().max() > 0 for direction in directions.values())
    parameters = dict(model.named_parameters())
    model.eval()
    with torch.no_grad():
        for name, direction in directions.items():
            parameters[name].add_(0.3 * direction.view(parameters[name].shape))
        expected = float(loss())
    assert expected != found.plain
    # Coefficients and sums are rounded to float32.
    assert float(found.loss[2]) == pytest.approx(expected, rel=1e-5)
