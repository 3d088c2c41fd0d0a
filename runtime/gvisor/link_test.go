package gvisor_test

import (
	"fmt"
	"testing"

	"github.com/atoll-run/atoll/runtime/runtimetest"
	"github.com/atoll-run/atoll/sandbox"
)

// conformance: FR5.2 NFR4.1
func TestASandboxUsesItsLinkAndAForkItsOwn(t *testing.T) {
	first, second := runtimetest.NewLink(t, 1), runtimetest.NewLink(t, 2)
	r, spec := start(t, func(s *sandbox.Spec) { s.Network, s.Link = sandbox.NetworkSandbox, first })
	greet := func(id string, link *sandbox.Link) {
		t.Helper()
		got := sh(t, r, id, fmt.Sprintf("exec bash -c 'exec 3<>/dev/tcp/%s/8080; read -r a b <&3; echo $a ${b%%%%:*}'", link.Gateway))
		if want := fmt.Sprintf("hello %s\n", link.Address.Addr()); got != want {
			t.Errorf("%s hears %q, want %q", id, got, want)
		}
		if got := sh(t, r, id, "head -n 1 /etc/resolv.conf"); got != "nameserver "+link.Gateway.String()+"\n" {
			t.Errorf("%s asks the resolver %q", id, got)
		}
	}
	greet(spec.ID, first)
	st, err := r.Stats(t.Context(), spec.ID)
	if err != nil || st.RxBytes == 0 || st.TxBytes == 0 {
		t.Errorf("after a conversation the link has received %d and sent %d bytes, %v", st.RxBytes, st.TxBytes, err)
	}
	state := t.TempDir()
	if err := r.Snapshot(t.Context(), spec.ID, state, sandbox.SnapshotOptions{}); err != nil {
		t.Fatal(err)
	}
	greet(spec.ID, first)
	fork := spec
	fork.ID, fork.Link = "fork", second
	if err := r.Restore(t.Context(), fork, state); err != nil {
		t.Fatal(err)
	}
	greet("fork", second)
	greet(spec.ID, first)
}
