"""Landscapes of PEFT's models, over dense and quantised bases."""

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")

from peft import LoraConfig
from quantized_bases import dense
from quantized_models import ONE_OF_EACH, batch, layers, two
from tiny import adapted, bits, same_bits, tokens

from flatkern import landscape
from flatkern.integrations.peft import attach, detach


def test_merged_weights_move_and_nothing_else():
    model = adapted()
    before = bits(model)
    with pytest.raises(ValueError, match=r"attach\(model\) first"):
        landscape.surface_1d(model, lambda: model(**tokens()).loss, points=3)
    attach(model)
    surface = landscape.surface_2d(model, lambda: model(**tokens()).loss, points=3)
    assert surface.in_place == ()
    names = landscape.Plane(model).names
    assert len(names) == 4
    assert all("base_layer" in name for name in names)
    top = landscape.hessian_top_eigenvalue(model, lambda: model(**tokens()).loss, tolerance=0.1)
    assert top > 0
    detach(model)
    assert same_bits(bits(model), before)
    model.eval()
    with torch.no_grad():
        assert float(model(**tokens()).loss) == surface.plain


def test_the_point_is_that_of_the_merged_weights():
    model = adapted()
    attach(model)
    plane = landscape.Plane(model, seed=5)
    found = landscape.surface_1d(model, lambda: model(**tokens()).loss, points=3, plane=plane)
    directions = {name: plane.direction(model, name, 0) for name in plane.names}
    for name, direction in directions.items():
        layer = model.get_submodule(name.removesuffix(".base_layer.weight"))
        merged = layer.base_layer.weight + layer.get_delta_weight("default")
        torch.testing.assert_close(direction.norm(dim=1), merged.norm(dim=1), rtol=1e-5, atol=0)
    detach(model)
    with torch.no_grad():
        for name, direction in directions.items():
            model.get_parameter(name).add_(direction)
        expected = float(model.eval()(**tokens()).loss)
    assert float(found.loss[2]) == pytest.approx(expected, rel=1e-5)


def test_several_adapters_of_one_model():
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    attach(model)
    plane = landscape.Plane(model)
    found = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        options = {"points": 3, "plane": plane}
        found[name] = landscape.surface_1d(model, lambda: model(**tokens()).loss, **options)
    assert (found["default"].loss != found["second"].loss).all()
    detach(model)


@ONE_OF_EACH
def test_quantised_bases_show_their_noise_beside_their_product(form):
    model = two(form)
    attach(model)
    x = batch()
    base = layers(model)[0].base_layer
    outputs = []
    handle = base.register_forward_hook(lambda module, args, output: outputs.append(output))

    def loss():
        return model(x).square().mean()

    options = {"sigma": 0.2, "draws": 1, "seed": 3}
    stored = dense(base)
    found = landscape.average_flatness(model, loss, **options)
    handle.remove()
    assert found.samples.isfinite().all()
    assert torch.equal(dense(base), stored)
    # The probe's hook was there first, so it saw the layer's own products.
    assert all(torch.equal(one, outputs[0]) for one in outputs)
    plus = landscape.surface_1d(model, loss, points=3)
    assert plus.plain == float(plus.loss[1])
    assert (plus.loss != plus.plain).sum() == 2
    assert plus.in_place == ()
    weight = dense(base)
    plane = landscape.Plane(model)
    lora = layers(model)[0]
    merged = weight + lora.get_delta_weight("default").double()
    direction = plane.direction(model, plane.names[0], 0)
    torch.testing.assert_close(
        direction.norm(dim=1).double(), merged.norm(dim=1), rtol=1e-3, atol=0
    )
    with pytest.raises(TypeError, match="stored as"):
        landscape.hessian_trace(model, loss, probes=1)
    with pytest.raises(TypeError, match="stored as"):
        landscape.worst_flatness(model, loss, draws=1)
    assert landscape.hessian_trace(model, loss, probes=1, scope="lora") is not None
    detach(model)


def test_the_first_product_of_a_quantised_base_is_that_of_w_plus_e():
    model = two("bnb-nf4-nested")
    attach(model)
    first = layers(model)[0]
    x = batch()
    seen = []
    probe = first.register_forward_hook(lambda module, args, output: seen.append(output))
    plane = landscape.Plane(model, seed=2)
    landscape.surface_1d(model, lambda: model(x).mean(), points=3, plane=plane)
    probe.remove()
    direction = plane.direction(model, plane.names[0], 0)
    clean, moved = seen[0], seen[-1]
    torch.testing.assert_close(moved - clean, x @ direction.T, rtol=1e-3, atol=1e-4)
    detach(model)
