# Targets are few and do whole things; `make help` lists them. The work is in
# scripts/, which run as well without make.

GO ?= go
export CGO_ENABLED ?= 0

version := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
go_build := $(GO) build -trimpath -buildvcs=false
carried := atoll-guest atoll-sentry
linter := build/tools/golangci-lint-v2.15.0

.DEFAULT_GOAL := build
.PHONY: help build demo test test-machines bench bench-clones bench-wan bench-llm bench-models conformance conformance-check lint generate generate-check fuzz cover deps clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

build: ## bin/atoll, with the programs that it carries
	$(go_build) -ldflags '-s -w' -o build/ ./cmd/atoll-guest ./cmd/atoll-sentry
	for p in $(carried); do cmp -s build/$$p cmd/atoll/assets/$$p || cp build/$$p cmd/atoll/assets/$$p; done
	$(go_build) -ldflags '-s -w -X main.version=$(version)' -o bin/atoll ./cmd/atoll

demo: ## install what is missing, build, and show the main job on real input
	@scripts/demo

test: deps ## every test: unit, real runtimes, end to end
	@scripts/test

test-machines: build ## the suite of E2B's SDK on sandboxes with a kernel of their own; takes long where they are emulated
	ATOLL_TEST_RUNTIME=microvm ATOLL_BIN=$(CURDIR)/bin/atoll $(GO) test ./test -run 'TestScripts/e2b/sdk.sh' -timeout 60m -count=1 -v

bench: build ## measure, beside bubblewrap, runc and E2B's SDK; writes docs/performance.md
	@scripts/deps bench
	cd test/e2b && npm install --no-package-lock --no-audit --no-fund --ignore-scripts --loglevel=error || true
	$(GO) run ./bench

bench-llm: build ## measure language models beside llama.cpp; writes docs/performance-llm.md
	$(GO) run ./bench/llm

bench-models: build ## measure what real models lose with fewer bits and sparse attention; takes an hour; writes docs/performance-models.md
	@scripts/bench-models

bench-clones: ## start 200 machines of one template at once and say what each takes; needs root and QEMU
	$(GO) test ./runtime/microvm -count=1 -v -run TestManyClonesRunAtOnce -clones 200

bench-wan: build ## measure moves between two nodes over an emulated slow link, beside naive copies; needs root
	$(GO) run ./bench/wan

conformance: build ## run the tests that prove requirements; writes docs/conformance.md
	$(GO) run ./internal/conformance -run

conformance-check: ## fail when docs/conformance.md is out of step with the tests
	$(GO) run ./internal/conformance -check

lint: $(linter) ## static checks
	$(GO) vet ./...
	$(linter) run

$(linter):
	GOBIN=$(CURDIR)/build/tools $(GO) install -trimpath github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
	mv build/tools/golangci-lint $@

generate: ## write generated code again
	proto/generate.sh
	$(GO) generate ./...

generate-check: ## fail when generated code is out of step with its source
	@scripts/generate-check

.PHONY: test-arm64
test-arm64: ## the kernels' tests as arm64 machines with and without dot products would run them, in emulation; needs qemu-user-static
	GOARCH=arm64 $(GO) vet ./tensor/...
	GOARCH=arm64 $(GO) test -exec 'qemu-aarch64-static -cpu max' -timeout 10m ./tensor ./tensor/squeeze
	GOARCH=arm64 $(GO) test -exec 'qemu-aarch64-static -cpu cortex-a53' -timeout 10m -run 'Kernels|Whole|Columns|Inputs|Rows' ./tensor

fuzz: ## a short run of every fuzz target
	@scripts/fuzz

cover: deps ## statement coverage of unit, integration and end-to-end runs together
	@scripts/cover

deps: ## install what building and testing need, through apt
	@scripts/deps

clean: ## remove what was built
	rm -rf bin build coverage $(addprefix cmd/atoll/assets/,$(carried))
