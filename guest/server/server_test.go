package server

import (
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	processpb "github.com/atoll-run/atoll/guest/gen/process"
	"github.com/atoll-run/atoll/guest/wire"
)

var testAccounts = accounts{
	passwd: []byte("root:x:0:0:root:/root:/bin/bash\n# a comment\nbroken line\nuser:x:1000:1000:,,,:/home/user:/bin/zsh\nbad:x:no:0::/:/bin/sh\nbare:x:1001:1001:::\n"),
	group:  []byte("root:x:0:\nuser:x:1000:\nwheel:x:10:root,user\ndocker:x:20:user\nbad:x:nan:user\n"),
}

func TestAccountsAreFoundByNameAndNumber(t *testing.T) {
	user := account{name: "user", uid: 1000, gid: 1000, groups: []int{10, 20}, home: "/home/user", shell: "/bin/zsh"}
	inDocker := user
	inDocker.gid, inDocker.groups = 20, []int{10}
	for spec, want := range map[string]account{
		"user":        user,
		"1000":        user,
		"user:docker": inDocker,
		"user:20":     inDocker,
		"bare":        {name: "bare", uid: 1001, gid: 1001, home: "/", shell: "/bin/sh"},
		"4242":        {name: "4242", uid: 4242, home: "/", shell: "/bin/sh"},
		"4242:99":     {name: "4242", uid: 4242, gid: 99, home: "/", shell: "/bin/sh"},
	} {
		if got, err := testAccounts.lookup(spec); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %+v %v, want %+v", spec, got, err, want)
		}
	}
	for _, spec := range []string{"", "nobody", "bad", "-1", "99999999999", "user:none", "# a comment", "broken line"} {
		if got, err := testAccounts.lookup(spec); err == nil {
			t.Errorf("%q: got %+v", spec, got)
		}
	}
}

func TestPathsAreResolved(t *testing.T) {
	s := &settings{}
	for path, want := range map[string]string{
		"": "/home/u", "f": "/home/u/f", "~": "/home/u", "~/f": "/home/u/f", "~other": "/home/u/~other",
		"/a/../b/./c//": "/b/c", "../..": "/", "/../x": "/x", wire.EncodeName("\xff"): "/home/u/\xff",
	} {
		if got, err := s.resolve(path, account{home: "/home/u"}); err != nil || got != want {
			t.Errorf("%q: got %q %v, want %q", path, got, err, want)
		}
	}
	s.workdir = "/work"
	for path, want := range map[string]string{"": "/work", "f": "/home/u/f"} {
		if got, _ := s.resolve(path, account{home: "/home/u"}); got != want {
			t.Errorf("with a working directory, %q: got %q, want %q", path, got, want)
		}
	}
}

func TestTheHostNameReplacesItsPredecessor(t *testing.T) {
	first := renameHost("127.0.0.1 localhost\n10.0.0.1 db\n", "debian", "one")
	if want := "127.0.0.1 localhost\n10.0.0.1 db\n127.0.1.1\tone\n"; first != want {
		t.Errorf("got %q", first)
	}
	if second := renameHost(first, "one", "two"); second != "127.0.0.1 localhost\n10.0.0.1 db\n127.0.1.1\ttwo\n" {
		t.Errorf("got %q", second)
	}
	if got := renameHost("", "", "x"); got != "127.0.0.1\tlocalhost\n127.0.1.1\tx\n" {
		t.Errorf("got %q", got)
	}
	for name, valid := range map[string]bool{
		"a": true, "a-b.c1": true, strings.Repeat("a", 64): true,
		"": false, "-a": false, "a-": false, ".": false, "a b": false, "a\n": false, "ä": false, strings.Repeat("a", 65): false,
	} {
		if validHostname(name) != valid {
			t.Errorf("%q: valid is %v", name, !valid)
		}
	}
}

func TestProcessLinesAreRead(t *testing.T) {
	line := "42 (a) b (c)) S 7 41 40 0 -1 4194560 1 2 3 4 150 50 0 0 20 0 1 0 100 1000 10"
	got, ok := parseStat([]byte(line))
	if want := (procStat{pid: 42, parent: 7, session: 40, cpu: 2 * time.Second}); !ok || got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got, ok := parseStat([]byte("42 (x) Z 7 41 40 0 -1 0 0 0 0 0 0 0")); !ok || !got.zombie {
		t.Errorf("got %+v", got)
	}
	for _, bad := range []string{"", "42", "42 (x", "42 (x) S", "x (x) S 7 41 40 0 -1 0 0 0 0 0 0 0", "(x) S 1 2 3 4 5 6 7 8 9 10 11 12 13"} {
		if got, ok := parseStat([]byte(bad)); ok {
			t.Errorf("%q: got %+v", bad, got)
		}
	}
}

func TestDescendantsAreFoundThroughOddTables(t *testing.T) {
	table := []procStat{
		{pid: 1}, {pid: 2, parent: 1}, {pid: 3, parent: 2}, {pid: 4, parent: 3, zombie: true}, {pid: 5, parent: 4}, {pid: 9, parent: 0},
		{pid: 6, parent: 7}, {pid: 7, parent: 6}, {pid: 1, parent: 5}, // read while it changed
	}
	if got := descendants(table, 1); !reflect.DeepEqual(got, []int{2, 3, 5}) {
		t.Errorf("got %v", got)
	}
	if got := descendants(table, 6); !reflect.DeepEqual(got, []int{7}) {
		t.Errorf("got %v", got)
	}
}

func TestCPUUseIsAShareOfAllProcessors(t *testing.T) {
	var c cpuMeter
	now := time.Unix(1000, 0)
	for _, step := range []struct {
		used    time.Duration
		elapsed time.Duration
		want    float64
	}{
		{5 * time.Second, 0, 0}, // nothing to compare with yet
		{6 * time.Second, time.Second, 50},
		{6 * time.Second, 0, 0},
		{4 * time.Second, time.Second, 0}, // the counter fell
		{9 * time.Second, time.Second, 100},
	} {
		now = now.Add(step.elapsed)
		if got := c.percent(step.used, now, 2); got != step.want {
			t.Errorf("%+v: got %v", step, got)
		}
	}
	if got := busyTime([]byte("cpu  10 20 30 400 50 6 7 8 9 10\ncpu0 1 2 3\n")); got != 81*clockTick {
		t.Errorf("got %v", got)
	}
	if got := busyTime([]byte("cpu  0 0 0 0 0\n")); got != 0 {
		t.Errorf("got %v", got)
	}
}

func TestMetadataIsReadFromHeaders(t *testing.T) {
	got, err := metadataOf(map[string][]string{"X-Metadata-Author": {"ann", "bob"}, "X-Metadata-": {"no key"}, "X-Other": {"x"}})
	if err != nil || !reflect.DeepEqual(got, map[string]string{"author": "ann"}) {
		t.Errorf("got %v %v", got, err)
	}
	if _, err := metadataOf(map[string][]string{"X-Metadata-Big": {strings.Repeat("x", wire.MaxMetadataBytes+1)}}); err == nil {
		t.Error("a value of any size is accepted")
	}
}

func TestALogLineHoldsSoMuchOfACommand(t *testing.T) {
	if got := clip([]string{"sh", "-c", strings.Repeat("x", 2*maxLine), "rest"}); len(got) != 3 || len(got[2]) > maxLine+3 || !strings.HasSuffix(got[2], "...") {
		t.Errorf("got %d arguments", len(got))
	}
}

func TestAClientThatLeavesHoldsUpNobody(t *testing.T) {
	var f fanout
	stuck, reader := f.subscribe(), f.subscribe()
	event := &processpb.ProcessEvent{Event: &processpb.ProcessEvent_Keepalive{}}
	published := make(chan bool)
	go func() {
		for range 3 * subscriberBacklog {
			f.publish(event)
		}
		f.publish(&processpb.ProcessEvent{Event: &processpb.ProcessEvent_End{End: &processpb.ProcessEvent_EndEvent{}}})
		close(published)
	}()
	for range subscriberBacklog {
		<-reader.events // publishing waits for stuck once its backlog is full
	}
	f.leave(stuck)
	for e := range reader.events {
		if e.GetEnd() != nil {
			break
		}
	}
	<-published
	late := f.subscribe()
	if e := <-late.events; e.GetEnd() == nil {
		t.Errorf("got %v", e)
	}
	f.leave(late)
}

func TestFailuresOfTheSystemHaveTheirStatus(t *testing.T) {
	for err, want := range map[error]int{
		syscall.ENOSPC: 507, syscall.EDQUOT: 507, syscall.ENOENT: 404, syscall.EACCES: 403, syscall.EIO: 500,
	} {
		if got := statusOf(err); got != want {
			t.Errorf("%v: got %d", err, got)
		}
	}
}
