package e2b

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// lives reports whether a sandbox ends about that many seconds after it began.
func lives(d sandboxDetail, seconds int) bool {
	return d.EndAt.Sub(d.StartedAt).Round(time.Second) == time.Duration(seconds)*time.Second
}

func TestBothGenerationsCreateWithTheirDefaults(t *testing.T) {
	s := newServer(t)
	var first, second createdSandbox
	s.want(s.do("POST", "/sandboxes", `{"templateID":"plain","unknownField":{"x":1}}`), 201).into(t, &first)
	s.want(s.do("POST", "/v2/sandboxes", `{"templateID":"plain:default","metadata":{"a":"b"},"envVars":{"K":"V"}}`), 201).into(t, &second)
	if first.EnvdToken != "" {
		t.Error("the first generation gives a token that was not asked for")
	}
	if second.EnvdToken == "" || second.EnvdVersion == "" || second.Alias != plainTemplate || second.Domain == nil || *second.Domain != "sandbox.test" {
		t.Errorf("incomplete: %+v", second)
	}
	if d := s.detail(first.SandboxID); !lives(d, defaultLifeV1) {
		t.Errorf("lives from %v to %v", d.StartedAt, d.EndAt)
	}
	d := s.detail(second.SandboxID)
	if !lives(d, defaultLife) || d.State != sandbox.Running || d.CPUCount != 2 || d.MemoryMB != 512 || d.DiskSizeMB != 1024 || d.Metadata["a"] != "b" {
		t.Errorf("%+v", d)
	}
	if d.TemplateID != second.TemplateID || d.Lifecycle.OnTimeout != "kill" || d.Lifecycle.AutoResume || d.EnvdToken != second.EnvdToken {
		t.Errorf("%+v", d)
	}
}

func TestRequestsThatMakeNoSenseAreRefused(t *testing.T) {
	s := newServer(t)
	for body, status := range map[string]int{
		`{}`:                                  400,
		`{"templateID":""}`:                   400,
		`nonsense`:                            400,
		`{"templateID":"nobodys"}`:            404,
		`{"templateID":"host"}`:               404, // an image of the node, not a template
		`{"templateID":"/etc"}`:               404,
		`{"templateID":"../x"}`:               404,
		`{"templateID":"plain:ghost"}`:        404,
		`{"templateID":"plain","timeout":-1}`: 400,
		`{"templateID":"plain","timeout":999999999999}`:                                                 400,
		`{"templateID":"plain","network":{"denyOut":["x.com"]}}`:                                        400,
		`{"templateID":"plain","autoPause":true,"autoPauseMemory":false,"autoResume":{"enabled":true}}`: 400,
		`{"templateID":"plain","iam":{"tokens":{}}}`:                                                    400,
		`{"templateID":"plain","volumeMounts":[{"name":"a","path":"/v"}]}`:                              404,
	} {
		r := s.do("POST", "/v2/sandboxes", body)
		var e apiError
		r.into(t, &e)
		if r.status != status || e.Code != status || e.Message == "" {
			t.Errorf("%s: status %d, %+v; want %d", body, r.status, e, status)
		}
	}
	if r := s.do("GET", "/no/such/route", ""); r.status != 404 || r.message() == "" {
		t.Errorf("an unknown route: %d %s", r.status, r.body)
	}
	if r := s.do("POST", "/v2/sandboxes", `{"templateID":"`+string(make([]byte, maxBody))+`"}`); r.status != 413 {
		t.Errorf("a body that is too large: %d %.80s", r.status, r.body)
	}
}

func TestMetadataChoosesTheRuntime(t *testing.T) {
	s := newServer(t)
	s.want(s.do("POST", "/v2/sandboxes", `{"templateID":"plain","metadata":{"atoll.runtime":"fake"}}`), 201)
	s.want(s.do("POST", "/v2/sandboxes", `{"templateID":"plain","metadata":{"atoll.runtime":"ghost"}}`), 400)
}

func TestAQueryThatCannotBeReadIsRefused(t *testing.T) {
	s := newServer(t)
	for _, path := range []string{"/v2/sandboxes?metadata=%zz", "/sandboxes?metadata=%zz", "/snapshots?limit=%"} {
		s.want(s.do("GET", path, ""), 400)
	}
}

func TestABodyThatIsTooLargeIsAnsweredAndNotCutOff(t *testing.T) {
	s := newServer(t)
	s.want(s.do("POST", "/v2/sandboxes", `{"templateID":"`+strings.Repeat("x", 20<<20)+`"}`), 413)
}

func TestOnlyTheOwnTeamSeesASandbox(t *testing.T) {
	s := newServer(t)
	id := s.create("").SandboxID
	for _, key := range []string{"", "e2b_0000000000000000000000000000000000000000"} {
		if r := s.as(key, "GET", "/v2/sandboxes", ""); r.status != 401 || r.message() == "" {
			t.Errorf("key %q: %d %s", key, r.status, r.body)
		}
	}
	if r := s.send("GET", "/sandboxes/"+id, "", http.Header{"Authorization": {"Bearer " + s.key}}, ""); r.status != 200 {
		t.Errorf("a key as bearer token: %d", r.status)
	}
	for _, c := range [][3]string{
		{"GET", "", ""}, {"DELETE", "", ""}, {"POST", "/connect", `{}`}, {"POST", "/pause", ""}, {"POST", "/resume", ""},
		{"POST", "/timeout", `{"timeout":5}`}, {"POST", "/refreshes", ""}, {"POST", "/snapshots", ""}, {"POST", "/fork", ""},
		{"PUT", "/network", `{}`}, {"GET", "/metrics", ""}, {"GET", "/logs", ""},
	} {
		if r := s.as(s.other, c[0], "/sandboxes/"+id+c[1], c[2]); r.status != 404 {
			t.Errorf("another team, %s %s: %d %s", c[0], c[1], r.status, r.body)
		}
	}
	for _, ref := range []string{id[:5], s.name(id)} {
		if r := s.do("GET", "/sandboxes/"+ref, ""); r.status != 404 {
			t.Errorf("%q is not an ID: %d", ref, r.status)
		}
	}
	if r := s.do("GET", "/sandboxes/"+id+"-client", ""); r.status != 200 {
		t.Errorf("an ID as old clients write it: %d", r.status)
	}
	var list []listedSandbox
	s.want(s.as(s.other, "GET", "/v2/sandboxes", ""), 200).into(t, &list)
	if len(list) != 0 {
		t.Errorf("another team sees %v", list)
	}
}

// name is what the node calls a sandbox.
func (s *server) name(id string) string {
	s.t.Helper()
	sb, err := s.node.Get(s.t.Context(), id)
	must(s.t, err)
	return sb.Name
}

func TestAKilledSandboxIsGone(t *testing.T) {
	s := newServer(t)
	id := s.create("").SandboxID
	s.want(s.do("DELETE", "/sandboxes/"+id, ""), 204)
	s.want(s.do("DELETE", "/sandboxes/"+id, ""), 404)
	s.want(s.do("GET", "/sandboxes/"+id, ""), 404)
	s.want(s.do("POST", "/v2/sandboxes/"+id+"/connect", ""), 404)
	s.want(s.do("POST", "/sandboxes/"+id+"/fork", ""), 404)
}

func TestConnectOnlyExtendsALifeAndTimeoutSetsIt(t *testing.T) {
	s := newServer(t)
	id := s.create(`"timeout":600`).SandboxID
	before := s.detail(id).EndAt
	s.want(s.do("POST", "/sandboxes/"+id+"/connect", `{"timeout":30}`), 200)
	s.want(s.do("POST", "/v2/sandboxes/"+id+"/connect", ""), 200)
	s.want(s.do("POST", "/sandboxes/"+id+"/refreshes", `{"duration":10}`), 204)
	s.want(s.do("POST", "/sandboxes/"+id+"/timeout", `{"timeout":20,"extendOnly":true}`), 204)
	if now := s.detail(id).EndAt; !now.Equal(before) {
		t.Errorf("the end moved from %v to %v", before, now)
	}
	s.want(s.do("POST", "/sandboxes/"+id+"/connect", `{"timeout":3600}`), 200)
	longer := s.detail(id).EndAt
	if !longer.After(before.Add(40 * time.Minute)) {
		t.Errorf("connect did not extend: %v, %v", before, longer)
	}
	s.want(s.do("POST", "/sandboxes/"+id+"/timeout", `{"timeout":60}`), 204)
	if now := s.detail(id).EndAt; !now.Before(before) {
		t.Errorf("timeout did not set: %v", now)
	}
	s.want(s.do("POST", "/sandboxes/"+id+"/refreshes", `{"duration":3600}`), 204)
	if now := s.detail(id).EndAt; !now.After(before) {
		t.Errorf("refresh did not extend: %v", now)
	}
	s.want(s.do("POST", "/sandboxes/"+id+"/timeout", `{}`), 400)
}

func TestATimeoutOfZeroEndsTheSandboxAtOnce(t *testing.T) {
	s := newServer(t)
	id := s.create("").SandboxID
	s.want(s.do("POST", "/sandboxes/"+id+"/timeout", `{"timeout":0}`), 204)
	if _, err := s.node.Wait(t.Context(), id, sandbox.Terminated); err != nil {
		t.Fatal(err)
	}
	s.want(s.do("GET", "/sandboxes/"+id, ""), 404)
}

func TestPauseAndResume(t *testing.T) {
	s := newServer(t)
	id := s.create(`"autoPause":true`).SandboxID
	s.want(s.do("POST", "/sandboxes/"+id+"/resume", ""), 409)
	s.want(s.do("POST", "/sandboxes/"+id+"/pause", `{"memory":false}`), 204)
	s.want(s.do("POST", "/v2/sandboxes/"+id+"/connect", `{"memory":false}`), 201)
	s.want(s.do("POST", "/sandboxes/"+id+"/pause", ""), 204)
	s.want(s.do("POST", "/sandboxes/"+id+"/pause", `{}`), 409)
	if d := s.detail(id); d.State != sandbox.Paused || d.Lifecycle.OnTimeout != "pause" {
		t.Errorf("%+v", d)
	}
	s.want(s.do("POST", "/sandboxes/"+id+"/fork", ""), 409)
	s.want(s.do("POST", "/sandboxes/"+id+"/snapshots", `{}`), 409)
	var sb createdSandbox
	s.want(s.do("POST", "/v2/sandboxes/"+id+"/connect", `{"timeout":77}`), 201).into(t, &sb)
	if d := s.detail(id); d.State != sandbox.Running || !lives(d, 77) || sb.SandboxID != id {
		t.Errorf("%+v", d)
	}
	s.want(s.do("POST", "/sandboxes/"+id+"/pause", ""), 204)
	s.want(s.do("POST", "/sandboxes/"+id+"/resume", `{"timeout":88}`), 201)
	if d := s.detail(id); !lives(d, 88) {
		t.Errorf("%+v", d)
	}
}

func TestASandboxPausesByItselfAtItsTimeout(t *testing.T) {
	s := newServer(t)
	id := s.create(`"autoPause":true`).SandboxID
	s.want(s.do("POST", "/sandboxes/"+id+"/timeout", `{"timeout":0}`), 204)
	if _, err := s.node.Wait(t.Context(), id, sandbox.Paused); err != nil {
		t.Fatal(err)
	}
	s.want(s.do("POST", "/sandboxes/"+id+"/connect", `{"timeout":60}`), 201)
}

func TestListsAreFilteredAndPaged(t *testing.T) {
	s := newServer(t)
	marks := map[string]string{"group": "a b/c&d=100%"}
	var ids []string
	for range 5 {
		ids = append(ids, s.create(`"metadata":{"group":"a b/c&d=100%","n":"1"}`).SandboxID)
	}
	s.create(`"metadata":{"group":"other"}`)
	slices.Reverse(ids) // newest first
	s.want(s.do("POST", "/sandboxes/"+ids[3]+"/pause", ""), 204)
	query := url.Values{"metadata": {nested(marks)}, "limit": {"2"}}
	var got []string
	for {
		r := s.want(s.do("GET", "/v2/sandboxes?"+query.Encode(), ""), 200)
		var list []listedSandbox
		r.into(t, &list)
		for _, sb := range list {
			got = append(got, sb.SandboxID)
		}
		if n := r.header.Get("X-Total-Running"); n != "4" {
			t.Errorf("X-Total-Running is %s", n)
		}
		token := r.header.Get("X-Next-Token")
		if token == "" {
			break
		}
		query.Set("nextToken", token)
	}
	if !slices.Equal(got, ids) {
		t.Errorf("got %v, want %v", got, ids)
	}
	for extra, want := range map[string]int{"&state=paused": 1, "&state=running": 4, "&state=running,paused": 5, "&template=plain": 5, "&template=ghost": 0, "&startedAfter=2200-01-01T00:00:00Z": 0} {
		var list []listedSandbox
		s.want(s.do("GET", "/v2/sandboxes?metadata="+url.QueryEscape(nested(marks))+extra, ""), 200).into(t, &list)
		if len(list) != want {
			t.Errorf("%s: %d sandboxes, want %d", extra, len(list), want)
		}
	}
	var old []listedSandbox
	s.want(s.do("GET", "/sandboxes", ""), 200).into(t, &old)
	if len(old) != 5 { // the paused one is not in it
		t.Errorf("the first generation lists %d", len(old))
	}
	for _, bad := range []string{"limit=0", "limit=101", "state=x", "nextToken=!", "order=up", "startedAfter=x"} {
		s.want(s.do("GET", "/v2/sandboxes?"+bad, ""), 400)
	}
}

func TestSnapshotsAreTemplatesToClients(t *testing.T) {
	s := newServer(t)
	id := s.create(`"metadata":{"who":"parent"}`).SandboxID
	var plain, named, again, tagged snapshotInfo
	s.want(s.do("POST", "/sandboxes/"+id+"/snapshots", `{}`), 201).into(t, &plain)
	s.want(s.do("POST", "/sandboxes/"+id+"/snapshots", `{"name":"my-snap"}`), 201).into(t, &named)
	s.want(s.do("POST", "/sandboxes/"+id+"/snapshots", `{"name":"my-snap"}`), 201).into(t, &again)
	s.want(s.do("POST", "/sandboxes/"+id+"/snapshots", `{"name":"my-snap:v1.2"}`), 201).into(t, &tagged)
	if len(plain.Names) != 0 || named.SnapshotID != "team/my-snap:default" || again.SnapshotID != named.SnapshotID || tagged.Names[0] != "team/my-snap:v1.2" {
		t.Fatalf("%+v %+v %+v %+v", plain, named, again, tagged)
	}
	s.want(s.do("POST", "/sandboxes/"+id+"/snapshots", `{"name":"not a name"}`), 400)
	s.want(s.do("POST", "/sandboxes/"+id+"/snapshots", `{"name":"plain"}`), 400) // a template's

	count := func(query string) int {
		t.Helper()
		var list []snapshotInfo
		s.want(s.do("GET", "/snapshots"+query, ""), 200).into(t, &list)
		return len(list)
	}
	for query, want := range map[string]int{"": 3, "?sandboxID=" + id: 3, "?name=my-snap": 2, "?name=my-snap:v1.2": 1, "?name=team/my-snap": 2, "?name=ghost": 0, "?limit=1": 1} {
		if got := count(query); got != want {
			t.Errorf("%s: %d snapshots, want %d", query, got, want)
		}
	}
	for _, ref := range []string{plain.SnapshotID, named.SnapshotID, "my-snap", "my-snap:v1.2"} {
		var sb createdSandbox
		s.want(s.do("POST", "/v2/sandboxes", `{"templateID":"`+ref+`"}`), 201).into(t, &sb)
		if want, _ := parseReference(ref); sb.SandboxID == id || want.name == "" {
			t.Errorf("%s: %+v", ref, sb)
		}
		if d := s.detail(sb.SandboxID); d.TemplateID != sb.TemplateID || !lives(d, defaultLife) {
			t.Errorf("%s: %+v", ref, d)
		}
	}
	if r := s.as(s.other, "POST", "/v2/sandboxes", `{"templateID":"`+named.SnapshotID+`"}`); r.status != 404 {
		t.Errorf("another team uses the snapshot: %d", r.status)
	}
	var tags []templateTag
	s.want(s.do("GET", "/templates/"+url.PathEscape(named.SnapshotID)+"/tags", ""), 200).into(t, &tags)
	if len(tags) != 1 || tags[0].Tag != "default" {
		t.Errorf("%+v", tags)
	}
	s.want(s.as(s.other, "DELETE", "/templates/"+url.PathEscape(named.SnapshotID), ""), 404)
	s.want(s.do("DELETE", "/templates/"+url.PathEscape(named.SnapshotID), ""), 204)
	s.want(s.do("DELETE", "/templates/"+url.PathEscape(named.SnapshotID), ""), 404)
	if got := count(""); got != 2 {
		t.Errorf("%d snapshots after one was deleted", got)
	}
}

func TestForksFailOrSucceedOneByOne(t *testing.T) {
	s := newServer(t)
	parent := s.create("")
	var out []forkResult
	s.want(s.do("POST", "/sandboxes/"+parent.SandboxID+"/fork", `{"count":3,"timeout":120}`), 201).into(t, &out)
	seen := map[string]bool{parent.SandboxID: true}
	for _, f := range out {
		if f.Error != nil || f.Sandbox == nil || seen[f.Sandbox.SandboxID] || f.Sandbox.TemplateID != parent.TemplateID {
			t.Fatalf("%+v", f)
		}
		seen[f.Sandbox.SandboxID] = true
		if f.Sandbox.EnvdToken == "" || f.Sandbox.EnvdToken == parent.EnvdToken {
			t.Error("a child shares its parent's token")
		}
		if d := s.detail(f.Sandbox.SandboxID); !lives(d, 120) {
			t.Errorf("%+v", d)
		}
	}
	if len(out) != 3 || s.detail(parent.SandboxID).State != sandbox.Running {
		t.Errorf("%d children", len(out))
	}
	for _, n := range []int{0, -1, maxForks + 1} {
		s.want(s.do("POST", "/sandboxes/"+parent.SandboxID+"/fork", fmt.Sprintf(`{"count":%d}`, n)), 400)
	}
}

func TestMetricsAndLogs(t *testing.T) {
	s := newServer(t)
	id := s.create("").SandboxID
	var metrics []sandboxMetric
	s.want(s.do("GET", "/sandboxes/"+id+"/metrics", ""), 200).into(t, &metrics)
	if len(metrics) == 0 || metrics[0].CPUCount != 2 || metrics[0].MemTotal != 512<<20 {
		t.Errorf("%+v", metrics)
	}
	s.want(s.do("GET", "/sandboxes/"+id+"/metrics?start=1&end=2", ""), 200).into(t, &metrics)
	if len(metrics) != 0 {
		t.Errorf("metrics from before the sandbox was: %+v", metrics)
	}
	s.want(s.do("GET", "/sandboxes/"+id+"/metrics?start=5&end=2", ""), 400)
	var many struct{ Sandboxes map[string]sandboxMetric }
	s.want(s.do("GET", "/sandboxes/metrics?sandbox_ids="+id+",ghost", ""), 200).into(t, &many)
	if len(many.Sandboxes) != 1 {
		t.Errorf("%+v", many)
	}
	var v1 struct {
		Logs    []logLine
		Entries []logEntry `json:"logEntries"`
	}
	s.want(s.do("GET", "/sandboxes/"+id+"/logs", ""), 200).into(t, &v1)
	if len(v1.Logs) == 0 || len(v1.Logs) != len(v1.Entries) {
		t.Errorf("%+v", v1)
	}
	var v2 struct{ Logs []logEntry }
	s.want(s.do("GET", "/v2/sandboxes/"+id+"/logs?search=running&level=info&direction=backward", ""), 200).into(t, &v2)
	if len(v2.Logs) != 1 || v2.Logs[0].Message != "sandbox is running" {
		t.Errorf("%+v", v2)
	}
	var teams []struct{ TeamID, APIKey string }
	s.want(s.do("GET", "/teams", ""), 200).into(t, &teams)
	if len(teams) != 1 || teams[0].TeamID != "team" || teams[0].APIKey != s.key {
		t.Errorf("%+v", teams)
	}
	var use []teamMetric
	s.want(s.do("GET", "/teams/team/metrics", ""), 200).into(t, &use)
	if len(use) == 0 || use[len(use)-1].Concurrent != 1 {
		t.Errorf("%+v", use)
	}
	s.want(s.do("GET", "/teams/team/metrics/max?metric=concurrent_sandboxes", ""), 200)
	s.want(s.do("GET", "/teams/other/metrics", ""), 403)
}
