"""`sparsify search`: what each linear of a model becomes, chosen for a budget.

Every group of linears that vLLM loads as one has up to six choices: dense or 2:4, with 16, 8 or 4 bits (`choices`). One walk
over the dense model solves them all, and each is measured by itself: how far the model's next-token distribution moves when
that group alone is compressed (`measure`, `held_out`). The divergence of a whole selection is modelled as the sum
(`selection`), and the selection of least divergence within a budget is a multiple-choice knapsack (`knapsack`). It is written
as `overrides` of the recipe (`overrides`) and can be held against really compressed models (`verify`).
"""
