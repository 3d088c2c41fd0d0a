package main

import (
	"bytes"
	"os"
	"runtime"
	"testing"
)

func TestEmbeddedFilterIsWhatGVisorWouldCompile(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("only amd64 has an embedded filter")
	}
	want, err := compile()
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile("../filters_amd64.json")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("filters_amd64.json is out of date: run go generate ./runtime/gvisor")
	}
}
