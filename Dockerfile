# syntax=docker/dockerfile:1
# The serving image: the API and its command line, with no training code and no LightGBM.
# Models in artifacts/ are baked in; others are mounted over /artifacts.

FROM python:3.12-slim AS build
WORKDIR /src
RUN python -m venv --without-pip /opt/propensity
COPY requirements-bootstrap.lock requirements.lock ./
RUN pip install --no-cache-dir --require-hashes -r requirements-bootstrap.lock \
 && uv pip install --no-cache --compile-bytecode --python /opt/propensity/bin/python --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY service service
COPY cli cli
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir dist . \
 && uv pip install --no-cache --compile-bytecode --python /opt/propensity/bin/python --no-deps dist/*.whl \
 && /opt/propensity/bin/propensity --help > /dev/null

FROM python:3.12-slim
RUN useradd --system --uid 10001 --no-create-home propensity \
 && mkdir /artifacts /data \
 && chown propensity /data
COPY --from=build /opt/propensity /opt/propensity
COPY artifacts/ /artifacts/
ENV PATH=/opt/propensity/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PROPENSITY_HOST=0.0.0.0 \
    PROPENSITY_PORT=8000 \
    PROPENSITY_ARTIFACTS=/artifacts \
    PROPENSITY_DATA_DIR=/data \
    PROPENSITY_LOG_FORMAT=json
USER propensity
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 CMD ["python", "-c", \
    "import os, urllib.request as http; http.urlopen('http://127.0.0.1:%s/livez' % os.environ['PROPENSITY_PORT'], timeout=2)"]
ENTRYPOINT ["propensity"]
CMD ["serve"]
