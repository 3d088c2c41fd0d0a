package node

import (
	"context"
	"testing"
	"time"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/sandbox"
)

// conformance: FR5.4
func TestOnlySnapshotsWithoutANameThatNothingNeedsExpire(t *testing.T) {
	h, ctx := newHost(t), context.Background()
	sb := h.create(CreateRequest{})
	save := func(name string) string {
		t.Helper()
		s, err := h.Snapshot(ctx, sb.ID, name)
		if err != nil {
			t.Fatal(err)
		}
		return s.ID
	}
	old, named, last := save(""), save("keep"), save("")
	if got := h.expireSnapshots(chunk.Rules{}); len(got) != 0 {
		t.Errorf("%v expire without a rule", got)
	}
	if got := h.expireSnapshots(chunk.Rules{KeepLast: 1, MaxAge: time.Nanosecond}); len(got) != 1 || got[0] != old {
		t.Errorf("%v expire, want %s", got, old)
	}
	_, err := h.GetSnapshot(ctx, old)
	wantKind(t, err, sandbox.NotFound)
	for _, id := range []string{named, last} {
		if _, err := h.GetSnapshot(ctx, id); err != nil {
			t.Error(err)
		}
	}
}
