# hybrid_lightning for CPUs:
#
#   docker build -t hybrid-lightning .
#   docker run --rm -v "$PWD:/work" hybrid-lightning fit --config gspo
FROM python:3.11-slim
# The kernels for CPUs are compiled when they are first needed.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /source
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu '/source[gguf,quantization]' && rm -rf /source
WORKDIR /work
ENTRYPOINT ["hybrid-lightning"]
