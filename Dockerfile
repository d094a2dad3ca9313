# The three scripts, for the CPU, or with --build-arg TORCH=cu130 for an NVIDIA GPU. Not built by .ci/run.
#
#   docker build -t nuclei .
#   docker build -t nuclei --build-arg TORCH=cu130 .
#   docker run --rm -v "$PWD:/work" nuclei nuclei-infer --images my_image.tif
#   docker run --rm -v "$PWD:/work" --gpus all --shm-size 8g nuclei nuclei-train
FROM python:3.12-slim
ARG TORCH=cpu
WORKDIR /opt/nuclei
COPY requirements.txt requirements-slides.txt ./
# torch and torchvision from one place first; the rest then finds them there.
RUN grep -E '^torch(vision)?>' requirements.txt > torch.txt \
    && pip install --no-cache-dir --index-url https://download.pytorch.org/whl/$TORCH -r torch.txt \
    && pip install --no-cache-dir -r requirements.txt -r requirements-slides.txt
COPY . .
RUN pip install --no-cache-dir --no-deps -e .
WORKDIR /work
CMD ["nuclei-doctor"]
