"""`vitos doctor`: a check of this machine, and an estimate of the memory and time of a recipe.

Read in this order:

1. `machine.py`: the checks of this machine (versions, devices, extras, disk).
2. `recipe.py`: the estimate of a recipe on a number of devices; `advice.py`: what fits, and remedies.
3. `estimate.py`: the formulas for memory; `optimizers.py`: sizes of optimizer states.
4. `speed.py` and `vllm_speed.py`: the formulas for time, in plain PyTorch and in vLLM.
5. `shapes.py`: the sizes of a model from its configuration; `devices.py`: memory and speed of known devices.

`tests/doctor/test_estimate.py` compares the memory with measured peaks of small models, and
`tests/doctor/test_vllm_speed.py` the speed of vLLM with published runs. Neither was compared on GPUs by us;
`scripts/gpu_check.py` is ready to do it.
"""
