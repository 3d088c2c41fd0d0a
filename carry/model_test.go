package carry_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/atoll-run/atoll/carry"
	"github.com/atoll-run/atoll/llm/modeltest"
	"github.com/atoll-run/atoll/sandbox"
)

// conformance: W2
func TestAModelArrivesAndItsNextVersionAsADifference(t *testing.T) {
	a, b := pairOf(t)
	file := modeltest.Path(t, "smollm2-135m-instruct-q4_1.gguf")
	one, err := a.models.Import(ctx, file, "one", nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := a.Push(ctx, carry.Model, "one", "b", nil)
	if err != nil {
		t.Fatal(err)
	}
	arrived := func(name, digest string) {
		t.Helper()
		if m, err := b.models.Info(name); err != nil || m.Digest != digest || m.Parameters != one.Parameters || m.Family != one.Family {
			t.Errorf("%+v, %v", m, err)
		}
	}
	arrived("one", one.Digest)
	t.Logf("measured: W2 a model of %d bytes: %d bytes sent", one.Bytes, res.Wire)

	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	copy(data[len(data)/2:], content(7, 100_000)) // weights, which may have any value
	tuned := filepath.Join(t.TempDir(), "tuned.gguf")
	if err := os.WriteFile(tuned, data, 0o600); err != nil {
		t.Fatal(err)
	}
	two, err := a.models.Import(ctx, tuned, "two", nil)
	if err != nil {
		t.Fatal(err)
	}
	if res, err = a.Push(ctx, carry.Model, "two", "b", nil); err != nil {
		t.Fatal(err)
	}
	arrived("two", two.Digest)
	if res.Wire > 200_000 {
		t.Errorf("of 100,000 bytes that changed, %+v is sent", res)
	}
	t.Logf("measured: W2 100,000 of its bytes changed: %d bytes sent", res.Wire)

	// The same weights by another name are there; the same name for other weights is taken.
	if _, err := a.models.Import(ctx, file, "again", nil); err != nil {
		t.Fatal(err)
	}
	if res, err = a.Push(ctx, carry.Model, "again", "b", nil); err != nil || res.Held != one.Bytes {
		t.Errorf("%+v, %v", res, err)
	}
	arrived("again", one.Digest)
	if err := a.models.Remove("one"); err != nil {
		t.Fatal(err)
	}
	if _, err := a.models.Import(ctx, tuned, "one", nil); err != nil {
		t.Fatal(err)
	}
	_, err = a.Push(ctx, carry.Model, "one", "b", nil)
	wantKind(t, err, sandbox.Exists)
	arrived("one", one.Digest)
	_, err = b.Pull(ctx, carry.Model, "none", "a", nil)
	wantKind(t, err, sandbox.NotFound)
}

func TestWhatArrivesAsAModelMustBeOne(t *testing.T) {
	a, b := pairOf(t)
	file := modeltest.Path(t, "smollm2-135m-instruct-q4_1.gguf")
	if _, err := a.models.Import(ctx, file, "bad", nil); err != nil {
		t.Fatal(err)
	}
	weights := a.models.Weights("bad")
	f, err := os.OpenFile(weights, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt([]byte("damaged"), 5000)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Push(ctx, carry.Model, "bad", "b", nil); err == nil {
		t.Error("weights that are not what they were are taken")
	}
	if all, err := b.models.List(); err != nil || len(all) != 0 {
		t.Errorf("%+v, %v", all, err)
	}
	if left, err := os.ReadDir(filepath.Join(b.dir, "models")); err == nil && len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}
