"""Recipes of llm-compressor. The texts are in the form that its documentation and examples use."""

from enum import Enum

import pytest
import yaml

from sparsify.errors import RecipeError
from sparsify.recipe import (
    Override,
    Prune,
    Quantize,
    QuantizeChange,
    Solver,
    dump_recipe,
    load_recipe,
    parse_recipe,
    recipe_from,
    settings_of,
)

TWO_STAGES = """
sparsity_stage:
  run_type: oneshot
  sparsity_modifiers:
    SparseGPTModifier:
      sparsity: 0.5
      mask_structure: "2:4"
      block_size: 128
      dampening_frac: 0.05
      targets: ["Linear"]
      ignore: ["re:.*lm_head"]
quantization_stage:
  run_type: oneshot
  quantization_modifiers:
    ConstantPruningModifier:
      targets: ['re:.*q_proj.weight']
      start: 0
    GPTQModifier:
      dampening_frac: 0.05
      ignore: ["lm_head"]
      config_groups:
        group_0:
          targets: ["Linear"]
          input_activations: null
          weights:
            num_bits: 4
            type: "int"
            symmetric: true
            strategy: "group"
            group_size: 128
            actorder: weight
            observer: mse
"""


GPTQ = Quantize(method="gptq", bits=4, group_size=128, activation_order=True)


def gptq(settings: str) -> str:
    return f"quant_stage:\n  quant_modifiers:\n    GPTQModifier:\n      {settings}\n"


def test_two_stages_become_two_passes() -> None:
    recipe = parse_recipe(TWO_STAGES)
    assert recipe.passes == [
        Prune(method="sparsegpt"),
        Quantize(method="gptq", bits=4, group_size=128, activation_order=True),
    ]
    assert recipe.solver == Solver(damping=0.05)
    assert recipe.ignore == ["re:.*lm_head", "lm_head"] and recipe.overrides == []
    assert recipe.export.format == "sparse24"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (gptq("scheme: W4A16"), GPTQ),
        (gptq("{scheme: W4A16, actorder: null}"), Quantize(method="gptq", bits=4, group_size=128)),
        (gptq("scheme: {W8A16: [Linear]}"), GPTQ.model_copy(update={"bits": 8})),
        (
            gptq("scheme: {weights: {num_bits: 8, strategy: channel, observer: memoryless_minmax}}"),
            Quantize(method="gptq", bits=8, group_size="channel", activation_order=True, scale_search=False),
        ),
        (
            gptq("{actorder: static, targets: Linear, scheme: w4a16, ignore: lm_head, offload_hessians: true}"),
            Quantize(method="gptq", bits=4, group_size=128, activation_order=True),
        ),
        (
            gptq("config_groups: {g: {weights: {num_bits: 4, group_size: -1}, targets: [Linear]}}"),
            Quantize(method="gptq", bits=4, group_size="channel", activation_order=True),
        ),
        (
            "s_stage:\n  s_modifiers:\n    QuantizationModifier: {scheme: W4A16, ignore: [lm_head]}\n",
            Quantize(method="rtn", bits=4, group_size=128),
        ),
        (
            gptq("{scheme: W4A16_ASYM, ignore: [lm_head]}"),
            Quantize(method="gptq", bits=4, group_size=128, symmetric=False, activation_order=True),
        ),
        (
            gptq("scheme: {weights: {num_bits: 8, symmetric: false, strategy: channel, zp_dtype: torch.int8}}"),
            Quantize(method="gptq", bits=8, group_size="channel", symmetric=False, activation_order=True),
        ),
        (
            "s_stage:\n  s_modifiers:\n    WandaPruningModifier: {sparsity: 0.5, mask_structure: 2:4}\n",
            Prune(method="wanda"),
        ),
    ],
)
def test_one_modifier_becomes_one_pass(text: str, expected: Prune | Quantize) -> None:
    recipe = parse_recipe(text)
    assert recipe.passes == [expected]
    assert recipe.export.format == ("sparse24" if isinstance(expected, Prune) else "pack-quantized")


def test_overrides_apply_to_the_translation() -> None:
    recipe = parse_recipe(gptq("scheme: W4A16"), overrides=["passes.quantize.group_size=64", "model=m"])
    assert recipe.quantize is not None and recipe.quantize.group_size == 64 and recipe.model == "m"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("s_stage:\n  s_modifiers:\n    SmoothQuantModifier: {smoothing_strength: 0.8}\n", 3, "SmoothQuantModifier"),
        ("s_stage:\n  s_modifiers:\n    AWQModifier: {}\n", 3, "AWQModifier has no counterpart"),
        ("s_stage:\n  s_modifiers:\n    QuIPModifier: {}\n    GPTQModifier: {scheme: W4A16}\n", 3, "while the model runs"),
        ("s_stage:\n  s_modifiers:\n    SpinQuantModifier: {rotations: [R1, R4]}\n", 3, "R3 and R4 turn activations"),
        (
            "s_stage:\n  s_modifiers:\n    GPTQModifier: {scheme: W4A16}\n    SmoothQuantModifier: {}\n",
            4,
            "stands after GPTQModifier; put it first",
        ),
        (
            "s_stage:\n  s_modifiers:\n    AWQModifier: {}\n    SparseGPTModifier: {mask_structure: 2:4}\n",
            3,
            "no modifier follows that quantizes",
        ),
        (
            "s_stage:\n  s_modifiers:\n    QuantizationModifier: {scheme: W4A16}\n    GPTQModifier: {scheme: W8A16}\n",
            4,
            "GPTQModifier and QuantizationModifier both quantize model.layers.0.self_attn.q_proj",
        ),
        (
            "s_stage:\n  s_modifiers:\n    MagnitudePruningModifier:\n      mask_structure: 2:4\n      init_sparsity: 0.0\n",
            5,
            "init_sparsity: 0.0 has no counterpart",
        ),
        ("s_stage:\n  run_type: train\n  s_modifiers: {}\n", 2, "stage 's_stage' is for training"),
        ("s_stage:\n  s_modifiers: {}\nfoo: 1\n", 3, "'foo' of an llm-compressor recipe"),
        ("s_stage:\n  s_modifiers: {}\n", 1, "no modifier that sparsify knows"),
        ("s_stage: 3\n", 1, "'s_stage' must be a mapping"),
        ("s_stage:\n  s_modifiers:\n    SparseGPTModifier: {sparsity: 0.7, mask_structure: 2:4}\n", 3, "sparsity: 0.7"),
        (
            "s_stage:\n  s_modifiers:\n    SparseGPTModifier:\n      mask_structure: 2:4\n      owl_m: 5\n",
            5,
            "'owl_m' has no counterpart",
        ),
        (
            "s_stage:\n  s_modifiers:\n    WandaPruningModifier:\n      mask_structure: 2:4\n      targets: [LlamaMLP]\n",
            5,
            "cannot be translated",
        ),
        (gptq("scheme: W8A8"), 4, "scheme: W8A8 has no counterpart in sparsify; write W4A16 or W8A16"),
        (gptq("ignore: [lm_head]"), 3, "needs a scheme or config_groups"),
        (gptq("{scheme: W4A16, ignore: [LlamaAttention]}"), 4, "'LlamaAttention' in ignore is a class"),
        (gptq("{scheme: W4A16, kv_cache_scheme: {num_bits: 8}}"), 4, "'kv_cache_scheme' has no counterpart"),
        (gptq("scheme: {weights: {num_bits: 3, strategy: channel}}"), 4, "num_bits: 3 has no counterpart"),
        (gptq("scheme: {weights: {num_bits: 4, type: float, strategy: channel}}"), 4, "type: float"),
        (gptq("scheme: {weights: {num_bits: 4, symmetric: maybe, strategy: channel}}"), 4, "symmetric: maybe"),
        (gptq("scheme: {weights: {num_bits: 4, strategy: group}}"), 4, "strategy: group needs a group_size"),
        (gptq("scheme: {weights: {num_bits: 4, strategy: group, group_size: 48}}"), 4, "group_size must be 32, 64"),
        (gptq("scheme: {weights: {num_bits: 4, strategy: channel}, input_activations: {num_bits: 8}}"), 4, "'input_"),
        (gptq("scheme: {weights: {num_bits: 4, strategy: channel, zp_dtype: torch.int8}}"), 4, "'zp_dtype' has no"),
        (gptq("{scheme: W2A16_ASYM}"), 4, "num_bits: 2 has no counterpart"),
        (gptq("{scheme: W2A16}"), 4, "num_bits: 2 has no counterpart"),
        (gptq("{scheme: W4A16, actorder: null, config_groups: {}}"), 4, "both scheme and config_groups"),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_refused_by_name(text: str, line: int, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "llmc.yaml")
    assert str(caught.value).startswith(f"llmc.yaml:{line}: "), caught.value
    assert words in str(caught.value)


def test_two_dampings_are_refused_with_their_line() -> None:
    text = TWO_STAGES.replace("dampening_frac: 0.05\n      ignore", "dampening_frac: 0.02\n      ignore")
    with pytest.raises(RecipeError, match=r"^r.yaml:9: dampening_frac is 0.05 here and 0.02 in GPTQModifier"):
        parse_recipe(text, "r.yaml")
    silent = TWO_STAGES.replace("dampening_frac: 0.05\n      ignore", "ignore")
    with pytest.raises(RecipeError, match=r"^r.yaml:9: dampening_frac is 0.05 here and 0.01 in GPTQModifier"):
        parse_recipe(silent, "r.yaml")
    assert parse_recipe(silent.replace("0.05", "0.01")).solver == Solver(damping=0.01)


def test_ignore_is_what_all_modifiers_ignore_and_the_rest_is_overrides() -> None:
    text = TWO_STAGES.replace('["re:.*lm_head"]', '["re:.*router", down_proj]')
    text = text.replace('ignore: ["lm_head"]', 'ignore: ["lm_head", "re:.*router", o_proj]')
    recipe = parse_recipe(text)
    assert recipe.ignore == ["re:.*router", "lm_head"]
    assert recipe.overrides == [Override(match="down_proj", prune=None), Override(match="o_proj", quantize=None)]
    with pytest.raises(RecipeError, match=r"^r.yaml:20: 're:\(' is not a valid regular expression"):
        parse_recipe(text.replace("o_proj", "'re:('"), "r.yaml")


def test_a_constant_mask_without_pruning_keeps_the_zeros_of_the_model():
    text = (
        "s_stage:\n  s_modifiers:\n    GPTQModifier: {scheme: W4A16, ignore: [lm_head], dampening_frac: 0.02}\n"
        "    ConstantPruningModifier: {targets: ['re:.*weight'], start: 0}\n"
    )
    recipe = parse_recipe(text)
    assert [step.kind for step in recipe.passes] == ["prune", "quantize"]
    assert recipe.prune.method == "keep" and recipe.quantize.method == "gptq"
    assert recipe.export.format == "sparse24" and recipe.solver.damping == 0.02
    alone = parse_recipe("s_stage:\n  s_modifiers:\n    ConstantPruningModifier: {targets: x}\n")
    assert alone.prune.method == "keep" and alone.quantize is None


# ---------------------------------------------------------------------------- by the rules of llm-compressor 0.14


@pytest.mark.parametrize(
    ("modifier", "group", "order"),
    [
        ("", "", True),  # static is the default since 0.8
        ("", "actorder: null", True),
        ("", "actorder: false", True),
        ("", "actorder: static", True),
        ("", "actorder: weight", True),
        ("actorder: null", "", False),
        ("actorder: null", "actorder: false", False),
        ("actorder: static", "", True),
        ("actorder: weight", "actorder: static", True),
        ("actorder: null", "actorder: static", None),  # an error there
        ("", "actorder: dynamic", None),
    ],
)
def test_the_order_of_columns_is_decided_as_llm_compressor_decides_it(
    modifier: str, group: str, order: bool | None
) -> None:
    text = gptq(
        f"{{{modifier + ', ' if modifier else ''}config_groups: {{g: {{weights: {{num_bits: 4, group_size: 32, {group}}}}}}}}}"
    )
    if order is None:
        with pytest.raises(RecipeError, match="actorder"):
            parse_recipe(text)
        return
    recipe = parse_recipe(text)
    assert recipe.quantize is not None and recipe.quantize.activation_order is order


WRITTEN = """
pruning_stage_0:
  pruning_modifiers:
    SparseGPTModifier:
      requires_calibration_data: true
      sparsity: 0.5
      mask_structure: '2:4'
      sequential_update: false
      targets: [Linear]
      ignore: ['re:.*lm_head']
      block_size: 128
      dampening_frac: 0.01
      preserve_sparsity_mask: false
      offload_hessians: false
pruning_stage_1:
  pruning_modifiers:
    GPTQModifier:
      config_groups:
        g:
          targets: [Linear]
          weights:
            num_bits: 4
            type: !!python/object/apply:compressed_tensors.quantization.quant_args.QuantizationType [
              int]
            symmetric: true
            group_size: 64
            strategy: !!python/object/apply:compressed_tensors.quantization.quant_args.QuantizationStrategy [
              group]
            block_structure: null
            dynamic: false
            actorder: null
            scale_dtype: null
            zp_dtype: null
            observer: memoryless_minmax
            observer_kwargs: {}
          input_activations: null
          output_activations: null
          format: null
      targets: [Linear]
      ignore: [lm_head]
      bypass_divisibility_checks: false
      requires_calibration_data: true
      block_size: 128
      dampening_frac: 0.01
      actorder: static
      batched_quantization: auto
"""


def test_what_llm_compressor_itself_writes_beside_a_model_loads() -> None:
    """Every key that 0.14.0.1 dumps, enumerations as Python tags, and stages numbered because a second recipe was appended."""
    recipe = parse_recipe(WRITTEN)
    order = Quantize(method="gptq", bits=4, group_size=64, activation_order=True, scale_search=False)
    assert recipe.passes == [Prune(method="sparsegpt"), order]
    assert recipe.solver == Solver(damping=0.01) and recipe.ignore == ["re:.*lm_head", "lm_head"]


def test_several_groups_become_overrides_that_leave_nothing_of_each_other() -> None:
    """compressed-tensors: a name wins over regular expressions, those over a class, among equals the alphabetically first."""
    text = gptq(
        """
      ignore: [lm_head]
      config_groups:
        one: {targets: ["re:.*down_proj$", "re:.*v_proj"], weights: {num_bits: 8, group_size: 32, strategy: group}}
        all: {targets: [Linear], weights: {num_bits: 4, group_size: 32, strategy: group}}
        two: {targets: [model.layers.2.mlp.down_proj], weights: {num_bits: 4, group_size: 64, strategy: group}}
"""
    )
    recipe = parse_recipe(text)
    eight, four = QuantizeChange(bits=8, group_size=32), QuantizeChange(bits=4, group_size=64)
    assert recipe.passes == [Quantize(method="gptq", bits=4, group_size=32, activation_order=True)]
    assert recipe.overrides == [
        Override(match="re:.*v_proj", quantize=eight),
        Override(match="re:.*down_proj$", quantize=eight),
        Override(match="model.layers.2.mlp.down_proj", quantize=four),
    ]


def test_linears_outside_of_the_targets_are_left_alone() -> None:
    text = (
        "s_stage:\n  s_modifiers:\n"
        "    WandaPruningModifier: {mask_structure: 2:4, targets: ['re:.*layers.[01]$', model.layers.3]}\n"
        "    QuantizationModifier: {scheme: {W8A16: ['re:model.*down_proj$'], W4A16: ['re:.*gate|re:x']}, ignore: [lm_head]}\n"
    )
    recipe = parse_recipe(text)
    names = {f"model.layers.{layer}.{part}" for layer in range(12) for part in ("mlp.down_proj", "mlp.gate_proj")}
    pruned = {name for name in names if settings_of(recipe, name).prune}
    assert pruned == {name for name in names if name.split(".")[2] in ("0", "1", "3")}
    bits = {name: step.bits for name in names if (step := settings_of(recipe, name).quantize)}
    assert bits == {name: 8 if "down" in name else 4 for name in names}
    assert (
        settings_of(recipe, "vision.model.layers.0.mlp.down_proj").quantize is None
    )  # the start of the full name counts


def test_two_modifiers_that_quantize_different_linears() -> None:
    text = (
        "s_stage:\n  s_modifiers:\n"
        "    QuantizationModifier: {scheme: W4A16, targets: ['re:.*self_attn.*'], ignore: [lm_head]}\n"
        "    GPTQModifier: {scheme: W8A16, targets: ['re:.*mlp.*'], ignore: [lm_head]}\n"
    )
    recipe = parse_recipe(text)
    attention = settings_of(recipe, "model.layers.0.self_attn.q_proj").quantize
    mlp = settings_of(recipe, "model.layers.0.mlp.up_proj").quantize
    assert attention == Quantize(method="rtn", bits=4, group_size=128)
    assert mlp == Quantize(method="gptq", bits=8, group_size=128, activation_order=True)


def test_gptq_without_groups_solves_those_of_the_modifier_before_in_their_order() -> None:
    text = (
        "s_stage:\n  s_modifiers:\n    QuantizationModifier:\n      ignore: [lm_head]\n"
        "      config_groups: {g: {targets: [Linear], weights: {num_bits: 4, group_size: 64}}}\n"
        "    GPTQModifier: {block_size: 64, dampening_frac: 0.05}\n"
    )
    recipe = parse_recipe(text)  # GPTQModifier's default order reaches groups of its own only
    assert recipe.passes == [Quantize(method="gptq", bits=4, group_size=64)] and recipe.solver.damping == 0.05
    ordered = parse_recipe(text.replace("group_size: 64}", "group_size: 64, actorder: static}"))
    assert ordered.quantize is not None and ordered.quantize.activation_order


def test_a_head_that_is_not_ignored_is_quantized() -> None:
    head = parse_recipe(gptq("{scheme: W4A16, ignore: ['re:.*router']}")).export.head
    assert head is not None and (head.bits, head.group_size, head.method, head.symmetric) == (4, 128, "gptq", True)
    asymmetric = parse_recipe(gptq("{scheme: W4A16_ASYM, ignore: ['re:.*router']}")).export.head
    assert asymmetric is not None and not asymmetric.symmetric
    for ignore in ("lm_head", "re:.*lm_head", "re:.*head$"):
        assert parse_recipe(gptq(f"{{scheme: W4A16, ignore: ['{ignore}']}}")).export.head is None


def test_a_magnitude_modifier_that_is_not_gradual_is_magnitude_pruning() -> None:
    text = "s_stage:\n  s_modifiers:\n    MagnitudePruningModifier:\n      {start: 0.0, targets: __ALL_PRUNABLE__, "
    text += (
        "init_sparsity: 0.5, final_sparsity: 0.5, update_scheduler: cubic, scheduler_args: {}, mask_structure: '2:4'}\n"
    )
    assert parse_recipe(text).passes == [Prune(method="magnitude")]


def test_a_class_in_ignore_that_is_ignored_by_name_too_says_nothing_new() -> None:
    recipe = parse_recipe(gptq("{scheme: W4A16, ignore: [lm_head, 're:.*self_attn', LlamaAttention]}"))
    assert recipe.ignore == ["lm_head", "re:.*self_attn"]


def test_awq_runs_first_with_the_quantization_that_it_prepares_for() -> None:
    text = "s_stage:\n  s_modifiers:\n    SmoothQuantModifier: {smoothing_strength: 0.8, ignore: null}\n    AWQModifier: {n_grid: 4}\n"
    text += "    GPTQModifier: {scheme: W4A16, ignore: [lm_head], dampening_frac: 0.05}\n"
    recipe = parse_recipe(text)
    assert recipe.llm_compressor == [
        {"SmoothQuantModifier": {"smoothing_strength": 0.8}},
        {"AWQModifier": {"n_grid": 4}},
        {"QuantizationModifier": {"scheme": "W4A16", "ignore": ["lm_head"]}},
    ]
    assert recipe.passes == [GPTQ] and recipe.solver.damping == 0.05
    assert parse_recipe(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize(
    ("modifiers", "words"),
    [
        ("[{GPTQModifier: {}, AWQModifier: {}}]", "an entry has one key"),
        ("[{GPTQModifier: {}}]", "before passes run AWQModifier, .*; GPTQModifier needs 'passes: \\[\\]'"),
        ("[{AWQModifier: {}}]", "AWQModifier needs a QuantizationModifier"),
        ("[{QuantizationModifier: {}}, {AWQModifier: {}}]", "AWQModifier needs a QuantizationModifier"),
        ("[{SmoothQuantModifier: {}}, {QuantizationModifier: {}}]", "nothing else does"),
    ],
)
def test_what_cannot_run_before_the_passes_is_refused(modifiers: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_recipe(f"version: 1\nllm_compressor: {modifiers}\npasses: [{{prune: {{method: magnitude}}}}]\n")


def stage(*modifiers: str) -> str:
    return "s_stage:\n" + "".join(f"  {i}_modifiers:\n    {modifier}\n" for i, modifier in enumerate(modifiers))


@pytest.mark.parametrize(
    ("text", "format"),
    [
        (stage("AutoRoundModifier: {scheme: W4A16}"), "pack-quantized"),
        (stage("AutoRoundModifier: {scheme: W4A16_ASYM}"), "compressed-tensors"),
        (stage("AutoRoundModifier: {scheme: {W8A16: [Linear], W3A16: ['re:.*up_proj$']}}"), "compressed-tensors"),
        (stage("AWQModifier: {}", "QuantizationModifier: {scheme: W4A16, weight_observer: imatrix_mse}"), "pack-quantized"),
        (stage("SparseGPTModifier: {sparsity: 0.5}"), "dense"),
        (stage("WandaPruningModifier: {mask_structure: 4:8}"), "dense"),
        (stage("SparseGPTModifier: {sparsity: 0.7}", "GPTQModifier: {scheme: W8A16}"), "pack-quantized"),
        (stage("GPTQModifier: {scheme: W4A16, actorder: group}"), "compressed-tensors"),
        (gptq("scheme: {weights: {num_bits: 4}}"), "compressed-tensors"),  # one scale for a whole matrix
        (gptq("config_groups: {a: {weights: {num_bits: 4, group_size: 16, observer_kwargs: {norm: 2}}}}"), "compressed-tensors"),
        (gptq("config_groups: {a: {weights: {num_bits: 4, group_size: 128}, targets: [Embedding]}}"), "compressed-tensors"),
        (gptq("{scheme: {weights: {num_bits: 4, strategy: channel}}, observer: {weights: imatrix_mse}}"), "pack-quantized"),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_runs_whole_in_llm_compressor(text: str, format: str) -> None:
    recipe = parse_recipe(text)
    assert recipe.whole and recipe.export.format == format and recipe.passes == []
    assert recipe_from({**recipe.model_dump(), "llm_compressor": recipe.llm_compressor}) == recipe


def test_a_whole_recipe_keeps_its_order_and_what_null_means() -> None:
    text = stage(
        "SparseGPTModifier: {sparsity: 0.3, block_size: 64, start: 0, index: null}",
        "SmoothQuantModifier: {}",
        "GPTQModifier: {scheme: W4A16, actorder: null, dampening_frac: null, requires_calibration_data: true}",
    )
    assert parse_recipe(text).llm_compressor == [
        {"SparseGPTModifier": {"sparsity": 0.3, "block_size": 64}},
        {"SmoothQuantModifier": {}},
        {"GPTQModifier": {"scheme": "W4A16", "actorder": None}},
    ]
    old = parse_recipe(stage("AWQModifier: {scheme: W4A16, duo_scaling: false}", "AutoRoundModifier: {iters: 1}"))
    assert old.llm_compressor == [
        {"AWQModifier": {"duo_scaling": False}},
        {"QuantizationModifier": {"scheme": "W4A16"}},
        {"AutoRoundModifier": {"iters": 1}},
    ]


@pytest.mark.parametrize(
    ("modifier", "line", "words"),
    [
        ("QuIPModifier: {}", 5, "QuIPModifier has no counterpart in sparsify, .*while the model runs"),
        ("SpinQuantModifier: {rotations: [R1, R4]}", 5, "R3 and R4 turn activations"),
        ("REAPPruningModifier: {}", 5, "does not remove experts"),
        ("OtherModifier: {}", 5, "OtherModifier has no counterpart in sparsify, which reads "),
        ("SparseGPTModifier: {sparsity_profile: owl}", 5, "sparsity_profile is not handed over"),
        ("QuantizationModifier: {scheme: FP8}", 5, "scheme: FP8 is no scheme of integer weights alone"),
        ("QuantizationModifier: {scheme: {W4A4: [Linear]}}", 5, "scheme: W4A4 is no scheme"),
        ("GPTQModifier: {scheme: W4A16, kv_cache_scheme: {num_bits: 8}}", 5, "key-value cache"),
        ("GPTQModifier: {scheme: {weights: {}, input_activations: {num_bits: 8}}}", 5, "quantized activations"),
        ("GPTQModifier: {config_groups: {a: {weights: {type: float, num_bits: 8}}}}", 5, "type: float is no integer"),
        ("GPTQModifier: {config_groups: {a: {weights: {num_bits: 1}}}}", 5, "num_bits must be a number from 2 to 8"),
    ],
)
def test_a_whole_recipe_is_refused_where_its_result_could_not_be_read(modifier: str, line: int, words: str) -> None:
    text = stage("AutoRoundModifier: {scheme: W4A16}", modifier)
    with pytest.raises(RecipeError, match=rf"^r.yaml:{line}: .*{words}"):
        parse_recipe(text, "r.yaml")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("export: {format: sparse24}", None),
        ("export: {format: compressed-tensors}", None),
        ("llm_compressor: [{SmoothQuantModifier: {}}]", "none of these modifiers prunes or quantizes"),
        ("llm_compressor: [{QuIPModifier: {}}]", "sparsify hands over AWQModifier, "),
        ("llm_compressor: [{AutoRoundModifier: {scheme: W2A16}}]", "pack-quantized cannot hold what these modifiers leave"),
        ("llm_compressor: [{SparseGPTModifier: {}}]", "pack-quantized stores integers .* use dense"),
        ("export: {format: pack-quantized, head: {bits: 8, group_size: 64}}", "llm-compressor decides on the output head"),
        ("ignore: [down_proj]", "ignore has no effect"),
        ("passes: [{prune: {method: magnitude}}]", "before passes run AWQModifier"),
        ("{llm_compressor: null, passes: [{prune: {method: wanda}}], export: {format: compressed-tensors}}", "as llm-compressor"),
        ("llm_compressor: null", "passes is empty"),
    ],
)  # fmt: skip
def test_what_a_whole_recipe_goes_together_with(more: str, words: str | None) -> None:
    data = {
        "llm_compressor": [{"AutoRoundModifier": {"scheme": "W4A16"}}],
        "passes": [],
        "export": {"format": "pack-quantized"},
        **yaml.safe_load(more),
    }
    if words is None:
        assert recipe_from(data).whole
        return
    with pytest.raises(RecipeError, match=words):
        recipe_from(data)


def test_modifier_objects_are_a_recipe() -> None:
    """A stand-in with the dump of llm-compressor's own: enumerations, nested lists, fields that record progress."""

    class GPTQModifier:
        def __init__(self, scheme: str) -> None:
            self.scheme = scheme

        def model_dump(self) -> dict[str, object]:
            return {"scheme": self.scheme, "ignore": ["lm_head"], "actorder": Strategy.STATIC, "initialized_": True}

    class Strategy(Enum):
        STATIC = "static"

    assert load_recipe([[GPTQModifier("W4A16")]]) == load_recipe(GPTQModifier("W4A16"))
    assert load_recipe([GPTQModifier("W4A16")]).passes == [GPTQ]
    with pytest.raises(RecipeError, match="a recipe is a mapping"):
        load_recipe([1])
