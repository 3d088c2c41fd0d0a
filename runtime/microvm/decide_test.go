package microvm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/atoll-run/atoll/runtime/microvm/vmm"
	"github.com/atoll-run/atoll/sandbox"
)

func TestThePoolFollowsDemandWithinItsBound(t *testing.T) {
	now := time.Unix(1000, 0)
	ago := func(s ...int) (out []time.Time) {
		for _, n := range s {
			out = append(out, now.Add(-time.Duration(n)*time.Second))
		}
		return out
	}
	for _, c := range []struct {
		claims []time.Time
		want   int
	}{{nil, 1}, {ago(60), 1}, {ago(60, 5), 2}, {ago(9, 5, 2), 4}, {ago(9, 8, 7, 6, 5, 4), 4}} {
		if got := poolSize(c.claims, now, 4); got != c.want {
			t.Errorf("after claims at %v there are to be %d machines, want %d", c.claims, got, c.want)
		}
	}
	if got := poolSize(ago(1), now, 0); got != 0 {
		t.Errorf("a pool of none keeps %d", got)
	}
}

func TestMemoryIsPromisedUpToAFactorAndWhileThereIsSome(t *testing.T) {
	host := memoryInfo{total: 8 << 30, available: 4 << 30}
	for _, c := range []struct {
		want, promised, available int64
		factor                    float64
		ok                        bool
	}{
		{1 << 30, 0, 4 << 30, 1, true},
		{1 << 30, 7 << 30, 4 << 30, 1, true},
		{1<<30 + 1, 7 << 30, 4 << 30, 1, false},
		{1 << 30, 70 << 30, 4 << 30, 10, true},
		{1 << 30, 0, 100 << 20, 10, false},
	} {
		host.available = c.available
		if err := host.admit(c.want, c.promised, c.factor); (err == nil) != c.ok || err != nil && !sandbox.Is(err, sandbox.Exhausted) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

// conformance: FR5.3
func TestIdleGuestsGiveWhatTheHostLacks(t *testing.T) {
	const mib = 1 << 20
	guest := func(given, available, held int64, idle bool) guestMemory {
		return guestMemory{size: 1024 * mib, given: given * mib, available: available * mib, held: held * mib, idle: idle}
	}
	full := guest(1024, 900, 700, true) // could do without 900, keeps 128; 576 of these are really held
	for name, c := range map[string]struct {
		available int64 // MiB, of 8192
		guests    []guestMemory
		want      []int64 // MiB
	}{
		"enough: nobody gives":              {4000, []guestMemory{full}, []int64{1024}},
		"too little: the idle give":         {1000, []guestMemory{full, guest(1024, 900, 700, false)}, []int64{252, 1024}},
		"no more than is lacking":           {1000, []guestMemory{full, full, full, full}, []int64{252, 252, 1024, 1024}},
		"whoever holds most first":          {1000, []guestMemory{guest(1024, 900, 200, true), full, full}, []int64{1024, 252, 252}},
		"unknown: left alone":               {1000, []guestMemory{guest(1024, -1, 700, true)}, []int64{1024}},
		"nothing held: nothing to be had":   {1000, []guestMemory{guest(1024, 900, 120, true)}, []int64{1024}},
		"in between: all stay":              {1500, []guestMemory{guest(252, -1, 100, true), full}, []int64{252, 1024}},
		"enough again: all get back":        {4000, []guestMemory{guest(252, -1, 100, true)}, []int64{1024}},
		"who works again gets back":         {1000, []guestMemory{guest(252, 128, 100, false)}, []int64{1024}},
		"who has little left gets back":     {1000, []guestMemory{guest(252, 30, 220, true)}, []int64{1024}},
		"who gave already gives no further": {1000, []guestMemory{guest(252, 128, 200, true)}, []int64{252}},
	} {
		for i, got := range shareMemory(memoryInfo{8192 * mib, c.available * mib}, c.guests) {
			if got != c.want[i]*mib {
				t.Errorf("%s: guest %d may use %d MiB, want %d", name, i, got/mib, c.want[i])
			}
		}
	}
	many := slices.Repeat([]guestMemory{full}, 3*balloonsAtOnce)
	given := 0
	for i, got := range shareMemory(memoryInfo{1 << 40, 0}, many) {
		if got < many[i].given {
			given++
		}
	}
	if given != balloonsAtOnce {
		t.Errorf("%d guests give at once, want %d", given, balloonsAtOnce)
	}
}

func TestChangesGoWhereTheyCostLeast(t *testing.T) {
	base, few, many := pageFile{Digest: "b"}, pageFile{Digest: "f", Bytes: writtenDelta}, pageFile{Digest: "m", Bytes: writtenDelta + 1}
	if o := place(origin{Base: []pageFile{base}, Delta: &few}); o.Delta == nil || len(o.Base) != 1 {
		t.Errorf("few changes go to %+v", o)
	}
	if o := place(origin{Base: []pageFile{base}, Delta: &many}); o.Delta != nil || len(o.Base) != 2 {
		t.Errorf("many changes go to %+v", o)
	}
	if o := place(origin{Delta: &few}); o.Delta != nil || len(o.Base) != 1 {
		t.Errorf("changes of a machine without a template go to %+v", o)
	}
}

func TestALayerHasANameOfItsOwn(t *testing.T) {
	if got := nextLayer([]string{"disk0.qcow2", "disk7.qcow2"}); got != "disk8.qcow2" {
		t.Errorf("nextLayer: %s", got)
	}
	if got := nextPages([]pageFile{{Name: "memory"}, {Name: "memory2"}}); got != "memory3" {
		t.Errorf("nextPages: %s", got)
	}
}

// pagesOf is a page file of a memory of eight pages.
func pagesOf(runs ...vmm.Run) []byte {
	b := pagesHeader(8*vmm.PageSize, runs)
	return append(b, make([]byte, pagesBytes(runs))...)
}

func FuzzPagesHeader(f *testing.F) {
	f.Add(pagesOf())
	f.Add(pagesOf(vmm.Run{First: 1, Count: 2}, vmm.Run{First: 7, Count: 1}))
	f.Add(pagesHeader(8*vmm.PageSize, []vmm.Run{{First: math.MaxUint32, Count: math.MaxUint32}}))
	f.Fuzz(func(t *testing.T, data []byte) {
		size, runs, length, err := parsePagesHeader(bytes.NewReader(data))
		if err != nil {
			return
		}
		next := int64(0)
		for _, r := range runs {
			if int64(r.First)*vmm.PageSize < next || r.Count == 0 {
				t.Fatalf("runs %v are out of order", runs)
			}
			next = (int64(r.First) + int64(r.Count)) * vmm.PageSize
		}
		if next > size {
			t.Fatalf("pages up to %d in a memory of %d", next, size)
		}
		if again := pagesHeader(size, runs); int64(len(again)) != length || !bytes.HasPrefix(data, again[:pagesFixed+8*len(runs)]) {
			t.Fatalf("the header becomes another one")
		}
	})
}

func FuzzManifest(f *testing.F) {
	good := manifest{Format: manifestFormat, Origin: origin{
		Shape: shape{Memory: 8 * vmm.PageSize, Disk: 1 << 20, CPUs: 1}, Base: []pageFile{{Name: "memory"}}, Delta: &pageFile{Name: "memory1"}, Layers: []string{"disk0.qcow2"},
	}}
	data, err := json.Marshal(good)
	if err != nil {
		f.Fatal(err)
	}
	if _, err := parseManifest(data); err != nil {
		f.Fatalf("a good manifest is refused: %v", err)
	}
	f.Add(data)
	f.Add(bytes.ReplaceAll(data, []byte("disk0.qcow2"), []byte("../../etc/passwd")))
	f.Add(bytes.ReplaceAll(data, []byte("disk0.qcow2"), []byte("memory")))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := parseManifest(data)
		if err != nil {
			return
		}
		var names []string
		for _, p := range append(slices.Clone(m.Origin.Base), *m.Origin.Delta) {
			names = append(names, p.Name)
		}
		for _, name := range append(names, m.Origin.Layers...) {
			if name == "" || name == ".." || bytes.ContainsRune([]byte(name), '/') {
				t.Fatalf("a file called %q", name)
			}
		}
	})
}

func TestTemplatesExpireByNumberSizeAndAgeUnlessSomethingIsMadeOfThem(t *testing.T) {
	now := time.Unix(1e9, 0)
	many := func(n int, u templateUse) (all []templateUse) {
		for i := range n {
			u.name = fmt.Sprint(i)
			u.used = now.Add(-templatesRest - time.Duration(i+1)*time.Minute)
			all = append(all, u)
		}
		return all
	}
	for name, c := range map[string]struct {
		all  []templateUse
		want []string
	}{
		"as many as are kept":  {many(templatesKept, templateUse{}), nil},
		"two more":             {many(templatesKept+2, templateUse{}), []string{"16", "17"}},
		"two more, in use":     {many(templatesKept+2, templateUse{linked: true}), nil},
		"too large together":   {many(3, templateUse{bytes: templatesBytes / 2}), []string{"2"}},
		"too large alone":      {many(2, templateUse{bytes: templatesBytes + 1}), []string{"0", "1"}},
		"too large, just used": {[]templateUse{{name: "a", used: now, bytes: templatesBytes + 1}}, nil},
		"too old":              {[]templateUse{{name: "a", used: now.Add(-templatesAge)}}, []string{"a"}},
		"too old, in use":      {[]templateUse{{name: "a", used: now.Add(-templatesAge), linked: true}}, nil},
		"damaged":              {[]templateUse{{name: "a"}}, []string{"a"}},
	} {
		if got := expired(c.all, now); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v expire, want %v", name, got, c.want)
		}
	}
}

func TestOldTemplatesAndUnfinishedOnesAreSweptAway(t *testing.T) {
	cache := t.TempDir()
	dir := filepath.Join(cache, "templates")
	long := time.Now().Add(-2 * templatesAge)
	for name, used := range map[string]time.Time{"old": long, "linked": long, "young": time.Now(), newPrefix + "old": long, newPrefix + "young": time.Now()} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		for _, file := range []string{templateName, memoryName} {
			path := filepath.Join(dir, name, file)
			if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Chtimes(path, used, used)); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Chtimes(filepath.Join(dir, name), used, used); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(filepath.Join(dir, "linked", memoryName), filepath.Join(cache, "machine")); err != nil {
		t.Fatal(err)
	}
	r := &Runtime{cfg: Config{Cache: cache}, log: slog.New(slog.DiscardHandler)}
	if err := newTemplates(r).sweep(); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range left {
		names = append(names, e.Name())
	}
	if want := []string{newPrefix + "young", "linked", "young"}; !slices.Equal(names, want) {
		t.Errorf("left are %v, want %v", names, want)
	}
}

func TestTheNewestOfAConsoleIsKept(t *testing.T) {
	dir := t.TempDir()
	var said []byte
	for i := range 60 {
		words := bytes.Repeat([]byte{byte('a' + i%26)}, 70_000)
		said = append(said, words...)
		if err := appendConsole(dir, words); err != nil {
			t.Fatal(err)
		}
		first, text, err := readConsole(dir)
		if err != nil || len(text) < min(len(said), consoleKept) || len(text) > 2*consoleKept || !bytes.Equal(text, said[first:]) {
			t.Fatalf("of %d bytes, %d are kept from %d on, %v", len(said), len(text), first, err)
		}
	}
}

func TestTheLastLinesOfAConsoleAreReadable(t *testing.T) {
	long := strings.Repeat("x", 1000)
	got := tail([]byte("first\r\n\x1b[2J\x1b[0;32m  OK  \x1b[0m] \xffgood\r\n\r\n" + long + "\n\x1b[\nlast"))
	want := []string{"  first", "  OK  ] good", "  " + long[:tailWidth], "  last"}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if got := tail(bytes.Repeat([]byte("line\n"), 100)); len(got) != tailLines {
		t.Errorf("%d lines", len(got))
	}
}
