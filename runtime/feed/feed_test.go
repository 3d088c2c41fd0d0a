package feed

import (
	"context"
	"fmt"
	"testing"

	"github.com/atoll-run/atoll/sandbox"
)

func TestASlowReaderLosesTheOldest(t *testing.T) {
	var f Feed
	slow := f.Watch(t.Context())
	for i := range Behind + 10 {
		f.Send(sandbox.Event{Sandbox: fmt.Sprint(i)})
	}
	f.Close()
	var got []string
	for e := range slow {
		got = append(got, e.Sandbox)
	}
	if len(got) != Behind || got[0] != "10" || got[len(got)-1] != fmt.Sprint(Behind+9) {
		t.Errorf("got %d events from %s to %s, want the newest %d", len(got), got[0], got[len(got)-1], Behind)
	}
}

func TestReadersEndWithTheirContextOrTheFeed(t *testing.T) {
	var f Feed
	ctx, cancel := context.WithCancel(t.Context())
	first, second := f.Watch(ctx), f.Watch(t.Context())
	cancel()
	<-first // returns only when it is closed
	f.Send(sandbox.Event{Sandbox: "x"})
	if e := <-second; e.Sandbox != "x" || e.Time.IsZero() {
		t.Errorf("the other reader got %+v", e)
	}
	f.Close()
	f.Close()
	for _, ch := range []<-chan sandbox.Event{second, f.Watch(t.Context())} {
		if _, open := <-ch; open {
			t.Error("a reader of a closed feed still waits")
		}
	}
}
