package microvm_test

import (
	"fmt"
	"testing"

	"github.com/atoll-run/atoll/runtime/microvm"
	"github.com/atoll-run/atoll/runtime/runtimetest"
	"github.com/atoll-run/atoll/sandbox"
)

// conformance: FR5.2 NFR1.3 NFR4.1
func TestAMachineUsesItsLinkAndAForkItsOwn(t *testing.T) {
	t.Parallel()
	r := open(t, t.TempDir(), func(c *microvm.Config) { c.Prewarm = 1 })
	t.Cleanup(func() { destroyAll(t, r) })
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
	specOf := func(id string, n byte) sandbox.Spec {
		s := spec(t, id)
		s.Network, s.Link = sandbox.NetworkSandbox, runtimetest.NewLink(t, n)
		return s
	}
	first := specOf("first", 1)
	if err := r.Create(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	greet(first.ID, first.Link)
	st, err := r.Stats(t.Context(), first.ID)
	if err != nil || st.RxBytes == 0 || st.TxBytes == 0 {
		t.Errorf("after a conversation the link has received %d and sent %d bytes, %v", st.RxBytes, st.TxBytes, err)
	}
	state := t.TempDir()
	if err := r.Snapshot(t.Context(), first.ID, state, sandbox.SnapshotOptions{}); err != nil {
		t.Fatal(err)
	}
	fork := specOf("fork", 2)
	if err := r.Restore(t.Context(), fork, state); err != nil {
		t.Fatal(err)
	}
	greet("fork", fork.Link)
	greet(first.ID, first.Link)
	// One that was made before it was known to whom it would belong.
	third := specOf("third", 3)
	if err := r.Create(t.Context(), third); err != nil {
		t.Fatal(err)
	}
	greet("third", third.Link)
}
