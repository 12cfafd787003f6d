"""Recipes of llm-compressor. The texts are in the form that its documentation and examples use."""

import pytest

from sparsify.errors import RecipeError
from sparsify.recipe import Override, Prune, Quantize, Solver, parse_recipe

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
        ("s_stage:\n  run_type: train\n  s_modifiers: {}\n", 2, "stage 's_stage' is for training"),
        ("s_stage:\n  s_modifiers: {}\nfoo: 1\n", 3, "'foo' of an llm-compressor recipe"),
        ("s_stage:\n  s_modifiers: {}\n", 1, "no modifier that sparsify knows"),
        ("s_stage: 3\n", 1, "'s_stage' must be a mapping"),
        ("s_stage:\n  s_modifiers:\n    SparseGPTModifier: {sparsity: 0.5}\n", 3, "mask_structure: 0:0 has no"),
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
        (gptq("{scheme: W4A16, actorder: group}"), 4, "write actorder: static"),
        (gptq("scheme: {weights: {num_bits: 3, strategy: channel}}"), 4, "num_bits: 3 has no counterpart"),
        (gptq("scheme: {weights: {num_bits: 4, type: float, strategy: channel}}"), 4, "type: float"),
        (gptq("scheme: {weights: {num_bits: 4, symmetric: false, strategy: channel}}"), 4, "symmetric: False"),
        (gptq("scheme: {weights: {num_bits: 4}}"), 4, "strategy: tensor has no counterpart"),
        (gptq("scheme: {weights: {num_bits: 4, strategy: group}}"), 4, "strategy: group needs a group_size"),
        (gptq("scheme: {weights: {num_bits: 4, strategy: group, group_size: 48}}"), 4, "group_size must be 32, 64"),
        (gptq("scheme: {weights: {num_bits: 4, strategy: channel}, input_activations: {num_bits: 8}}"), 4, "'input_"),
        (gptq("scheme: {weights: {num_bits: 4, strategy: channel, zp_dtype: torch.int8}}"), 4, "'zp_dtype' has no"),
        (gptq("config_groups: {a: {weights: {}}, b: {weights: {}}}"), 4, "strategy: tensor has no counterpart"),
        (gptq("config_groups: {a: {weights: {num_bits: 4, group_size: 128}, targets: [Embedding]}}"), 4, "is a class"),
        (gptq("{scheme: W4A16, weight_observer: imatrix_mse}"), 4, "observer: imatrix_mse has no counterpart"),
        (gptq("{scheme: W4A16_ASYM}"), 4, "symmetric: False has no counterpart"),
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
