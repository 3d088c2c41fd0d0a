package e2b

import (
	"net/url"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// nested encodes metadata as the SDKs do: each part once, and all of it as one
// parameter.
func nested(m map[string]string) string {
	inner := url.Values{}
	for k, v := range m {
		inner.Set(componentEscape(k), componentEscape(v))
	}
	return inner.Encode()
}

// componentEscape is JavaScript's encodeURIComponent as far as tests need it.
func componentEscape(s string) string { return strings.ReplaceAll(url.QueryEscape(s), "+", "%20") }

func TestMetadataIsDecodedAsTheSDKsEncodeIt(t *testing.T) {
	want := map[string]string{"team/slug!": "hello & 100% 😀", "a=b": "c d+e", "plain": "x", "escape": "%41"}
	got, err := parseMetadata(nested(want))
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("got %q, %v; want %q", got, err, want)
	}
}

func TestMetadataEncodedOnlyOnceIsUnderstood(t *testing.T) {
	got, err := parseMetadata("team%2Fslug!=hello%20%26%20100%25%20%F0%9F%98%80&version=v%3D2")
	want := map[string]string{"team/slug!": "hello & 100% 😀", "version": "v=2"}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("got %q, %v; want %q", got, err, want)
	}
}

func TestStatesComeAsListOrRepeated(t *testing.T) {
	for _, c := range []struct {
		in   []string
		want []sandbox.State
	}{
		{nil, []sandbox.State{sandbox.Running, sandbox.Paused}},
		{[]string{"running,paused"}, []sandbox.State{sandbox.Running, sandbox.Paused}},
		{[]string{"paused", "paused"}, []sandbox.State{sandbox.Paused}},
	} {
		got, err := parseStates(c.in)
		if err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%q: got %v, %v", c.in, got, err)
		}
	}
	if _, err := parseStates([]string{"asleep"}); !sandbox.Is(err, sandbox.Invalid) {
		t.Errorf("an unknown state gave %v", err)
	}
}

func TestPagesShowEachItemOnceWhateverIsAddedOrRemovedBetween(t *testing.T) {
	base := time.Unix(1000, 0)
	key := func(n int) cursor {
		return cursor{at: base.Add(time.Duration(n/2) * time.Second), id: string(rune('a' + n))}
	}
	all := []int{3, 0, 5, 1, 4, 2}
	for _, ascending := range []bool{false, true} {
		var got []int
		var after *cursor
		items := append([]int(nil), all...)
		for step := 0; ; step++ {
			part, token := page(append([]int(nil), items...), key, after, 2, ascending)
			got = append(got, part...)
			if token == "" {
				break
			}
			var err error
			if after, err = parseCursor(token); err != nil {
				t.Fatal(err)
			}
			if step == 0 && !ascending {
				items = append(items, 9) // newer than the first page: belongs to no later one
			}
		}
		want := []int{5, 4, 3, 2, 1, 0}
		if ascending {
			want = []int{0, 1, 2, 3, 4, 5}
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("ascending %v: got %v", ascending, got)
		}
	}
}

func FuzzMetadata(f *testing.F) {
	f.Add("a%253Db=c")
	f.Add("user=abc&app=prod")
	f.Fuzz(func(t *testing.T, s string) {
		m, err := parseMetadata(s)
		if err == nil && len(m) > maxMetadataPairs {
			t.Fatalf("%d pairs", len(m))
		}
	})
}

func FuzzMetadataRoundTrip(f *testing.F) {
	f.Add("k=%", "v &+😀")
	f.Fuzz(func(t *testing.T, k, v string) {
		got, err := parseMetadata(nested(map[string]string{k: v}))
		if err != nil || got[k] != v {
			t.Fatalf("%q: %q became %q, %v", k, v, got, err)
		}
	})
}

func FuzzCursor(f *testing.F) {
	f.Add(cursor{at: time.Unix(1, 2), id: "abc"}.String())
	f.Fuzz(func(t *testing.T, s string) {
		c, err := parseCursor(s)
		if err != nil || c == nil {
			return
		}
		again, err := parseCursor(c.String())
		if err != nil || again.compare(*c) != 0 {
			t.Fatalf("%q became %v, %v", s, again, err)
		}
	})
}

func FuzzListQuery(f *testing.F) {
	f.Add("state=running,paused&limit=3&order=asc&startedAfter=2026-01-01T00:00:00Z&metadata=a%3Db")
	f.Fuzz(func(t *testing.T, s string) {
		q, err := url.ParseQuery(s)
		if err != nil {
			return
		}
		lq, err := parseListQuery(q, "team")
		if err == nil && (lq.limit < 1 || lq.limit > pageLimit || lq.filter.Team != "team") {
			t.Fatalf("%+v", lq)
		}
		if lq, err := parseLogQuery(q); err == nil && (lq.limit < 0 || lq.limit > maxLogs) {
			t.Fatalf("%+v", lq)
		}
		_, _, _ = parseInterval(q, time.Second)
	})
}
