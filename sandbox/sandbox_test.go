package sandbox

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
)

func TestAKindSurvivesWrapping(t *testing.T) {
	inner := Errorf("gvisor.Create", Exhausted, "abc", "no memory").WithHint("stop others")
	outer := fmt.Errorf("while creating: %w", E("node.Create", "", "abc", inner))
	if KindOf(outer) != Exhausted || !Is(outer, Exhausted) || !KindOf(outer).Retryable() {
		t.Errorf("kind is %s", KindOf(outer))
	}
	if HintOf(outer) != "stop others" {
		t.Errorf("hint is %q", HintOf(outer))
	}
	if !strings.Contains(outer.Error(), "no memory") {
		t.Errorf("the message loses its cause: %s", outer)
	}
}

func TestKindsOfForeignErrors(t *testing.T) {
	for err, want := range map[error]Kind{
		context.Canceled: Canceled, context.DeadlineExceeded: Timeout, errors.New("boom"): Internal,
	} {
		if got := KindOf(fmt.Errorf("x: %w", err)); got != want {
			t.Errorf("%v is %s, want %s", err, got, want)
		}
	}
	if KindOf(nil) != "" || Is(nil, Internal) {
		t.Error("nil has a kind")
	}
}

func TestTheNearestHintWins(t *testing.T) {
	inner := Errorf("a", Internal, "", "cause").WithHint("near")
	if got := HintOf(E("b", "", "", inner).WithHint("far")); got != "near" {
		t.Errorf("hint is %q", got)
	}
}

func TestNewIDsAreValidAndDiffer(t *testing.T) {
	seen := make(map[string]bool)
	for range 1000 {
		id := NewID()
		if !ValidID(id) || seen[id] {
			t.Fatalf("bad id %q", id)
		}
		seen[id] = true
	}
	for _, bad := range []string{"", "A", "a-b", "../x", strings.Repeat("a", 41)} {
		if ValidID(bad) {
			t.Errorf("%q is accepted", bad)
		}
	}
}

func TestIsolationLevelsAreOrdered(t *testing.T) {
	if !IsolationMachine.AtLeast(IsolationUserKernel) || IsolationProcess.AtLeast(IsolationUserKernel) || !IsolationProcess.AtLeast(IsolationProcess) {
		t.Error("isolation levels are out of order")
	}
	if Isolation("").AtLeast(IsolationProcess) {
		t.Error("an unknown level counts as isolation")
	}
}
