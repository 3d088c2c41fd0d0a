package e2b

import (
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/atoll-run/atoll/node"
)

// requested is the answer to a request for a build.
type requested struct {
	TemplateID, BuildID string
	Aliases, Names      []string
	Tags                []string
	Public              bool
}

func (s *server) requestBuild(body string) requested {
	s.t.Helper()
	var out requested
	s.want(s.do("POST", "/v3/templates", body), 202).into(s.t, &out)
	return out
}

var uuidPattern = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

func TestATemplateIsRequestedListedPublishedAndDeleted(t *testing.T) {
	s := newServer(t)
	b := s.requestBuild(`{"name":"my-app:v1","tags":["stable"],"cpuCount":4,"memoryMB":1024}`)
	if !uuidPattern.MatchString(b.BuildID) || !slices.Equal(b.Tags, []string{"v1", "stable"}) || !slices.Equal(b.Aliases, []string{"my-app"}) || !slices.Equal(b.Names, []string{"team/my-app"}) {
		t.Errorf("%+v", b)
	}
	if again := s.requestBuild(`{"alias":"my-app"}`); again.TemplateID != b.TemplateID || again.BuildID == b.BuildID || !slices.Equal(again.Tags, []string{"default"}) {
		t.Errorf("a second build: %+v", again)
	}
	var list []listedTemplate
	for _, path := range []string{"/templates", "/v2/templates", "/templates?teamID=team"} {
		s.want(s.do("GET", path, ""), 200).into(t, &list)
		i := slices.IndexFunc(list, func(l listedTemplate) bool { return l.TemplateID == b.TemplateID })
		if i < 0 || list[i].BuildCount != 2 || list[i].BuildStatus != node.BuildWaiting || list[i].EnvdVersion == "" {
			t.Errorf("%s: %+v", path, list)
		}
	}
	s.want(s.do("GET", "/templates?teamID=other", ""), 403)
	s.want(s.as(s.other, "GET", "/templates", ""), 200).into(t, &list)
	if len(list) != 0 {
		t.Errorf("another team lists %+v", list)
	}
	var with templateWithBuilds
	s.want(s.do("GET", "/templates/my-app", ""), 200).into(t, &with)
	if len(with.Builds) != 2 || with.Builds[1].CPUCount != 4 || with.Builds[1].MemoryMB != 1024 {
		t.Errorf("%+v", with)
	}
	s.want(s.do("GET", "/templates/aliases/my-app", ""), 200)
	s.want(s.do("GET", "/templates/aliases/base", ""), 200)
	s.want(s.do("GET", "/templates/aliases/ghost", ""), 404)
	s.want(s.as(s.other, "GET", "/templates/aliases/my-app", ""), 403)
	s.want(s.as(s.other, "PATCH", "/v2/templates/my-app", `{"public":true}`), 404)
	if r := s.want(s.do("PATCH", "/v2/templates/my-app", `{"public":true}`), 200); string(r.body) != `{"names":["team/my-app"]}` {
		t.Errorf("%s", r.body)
	}
	s.want(s.as(s.other, "GET", "/templates/aliases/my-app", ""), 200)
	s.want(s.as(s.other, "DELETE", "/templates/my-app", ""), 403) // public now: there, but not theirs
	s.want(s.do("PATCH", "/templates/my-app", `{"public":false}`), 200)
	s.want(s.do("DELETE", "/templates/my-app", ""), 204)
	s.want(s.do("DELETE", "/templates/my-app", ""), 404)
}

func TestBuildRequestsAreChecked(t *testing.T) {
	s := newServer(t)
	for body, message := range map[string]string{
		`{"name":"x","cpuCount":0}`:         "validation error",
		`{"name":"x","memoryMB":32}`:        "validation error",
		`{"name":"x","cpuCount":1024}`:      "CPU count can't be higher than",
		`{"name":"x","memoryMB":104857600}`: "Memory can't be higher than",
		`{"name":"x","memoryMB":1001}`:      "Memory must be divisible by 2",
		`{}`:                                `"" is not a name`,
		`{"name":"a/b/c"}`:                  `"a/b/c" is not a name`,
		`{"name":"x","tags":[":v1"]}`:       `":v1" is not a tag`,
	} {
		if r := s.do("POST", "/v3/templates", body); r.status != 400 || !strings.HasPrefix(r.message(), message) {
			t.Errorf("%s: %d %s", body, r.status, r.body)
		}
	}
	s.want(s.as(s.other, "POST", "/v3/templates", `{"name":"plain"}`), 409) // another team's
}

func TestTagsMoveBetweenBuilds(t *testing.T) {
	s := newServer(t)
	var old struct {
		BuildID string
		Tags    []string
	}
	s.want(s.do("POST", "/templates/tags", `{"target":"plain:default","tags":["v1","plain:stable"]}`), 201).into(t, &old)
	if !slices.Equal(old.Tags, []string{"v1", "stable"}) {
		t.Errorf("%+v", old)
	}
	s.want(s.do("POST", "/v2/sandboxes", `{"templateID":"plain:v1"}`), 201)
	next := s.requestBuild(`{"name":"plain"}`)
	s.ready(next.TemplateID, "")
	var moved struct{ BuildID string }
	for body, status := range map[string]int{
		`{"target":"plain:ghost","tags":["x"]}`: 404,
		`{"target":"ghost:v1","tags":["x"]}`:    404,
		`{"target":"plain","tags":[]}`:          400,
		`{"target":"plain","tags":[":x"]}`:      400,
		`{"target":"plain","tags":["plain:"]}`:  400,
		`{"target":"plain","tags":[""]}`:        400,
	} {
		s.want(s.do("POST", "/templates/tags", body), status)
	}
	s.want(s.as(s.other, "POST", "/templates/tags", `{"target":"plain","tags":["x"]}`), 403)
	s.want(s.do("POST", "/templates/tags", `{"target":"plain:v1","tags":["v2"]}`), 201).into(t, &moved)
	if moved.BuildID != old.BuildID {
		t.Error("a tag of a tag means another build")
	}
	var tags []templateTag
	s.want(s.do("GET", "/templates/plain/tags", ""), 200).into(t, &tags)
	if len(tags) != 3 {
		t.Errorf("%+v", tags)
	}
	s.want(s.do("DELETE", "/templates/tags", `{"name":"plain","tags":["v1"]}`), 204)
	s.want(s.do("DELETE", "/templates/tags", `{"name":"plain","tags":["v1"]}`), 404)
	s.want(s.do("DELETE", "/templates/tags", `{"name":"plain","tags":["default"]}`), 400)
	s.want(s.do("POST", "/v2/sandboxes", `{"templateID":"plain:v1"}`), 404)
}

func TestBuildFilesAreUploadedByLink(t *testing.T) {
	s := newServer(t)
	b := s.requestBuild(`{"name":"with-files"}`)
	hash := strings.Repeat("0a", 32)
	type uploadLink struct {
		Present bool
		URL     string
	}
	ask := func() (l uploadLink) {
		t.Helper()
		s.want(s.do("GET", "/templates/"+b.TemplateID+"/files/"+hash, ""), 201).into(t, &l)
		return l
	}
	l := ask()
	path, ok := strings.CutPrefix(l.URL, s.http.URL)
	if l.Present || !ok {
		t.Fatalf("%+v", l)
	}
	s.want(s.send("PUT", path, "archive", http.Header{}, ""), 200)
	if l := ask(); !l.Present || l.URL == "" {
		t.Errorf("%+v", l)
	}
	stored, err := os.ReadFile(filepath.Join(s.node.FilesDir(b.TemplateID), hash))
	if err != nil || string(stored) != "archive" {
		t.Errorf("%q, %v", stored, err)
	}
	s.want(s.send("PUT", strings.Replace(path, hash, strings.Repeat("0b", 32), 1), "archive", http.Header{}, ""), 403)
	s.want(s.send("PUT", path+"0", "archive", http.Header{}, ""), 403)
	for _, bad := range []string{"..%2F..%2Fetc", "abc", strings.Repeat("0A", 32)} {
		s.want(s.do("GET", "/templates/"+b.TemplateID+"/files/"+bad, ""), 400)
	}
	s.want(s.as(s.other, "GET", "/templates/"+b.TemplateID+"/files/"+hash, ""), 404)
}
