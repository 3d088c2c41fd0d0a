package native

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"strings"
	"testing"

	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
)

func TestProblemIsTheErrorAndBack(t *testing.T) {
	inner := sandbox.Errorf("image.Get", sandbox.NotFound, "nosuch", "no such image").WithHint("pull it")
	for _, err := range []error{
		inner,
		sandbox.E("node.Create", "", "", inner),
		sandbox.E("x.Y", sandbox.Exhausted, "disk", errors.New("full")),
		&sandbox.Err{Op: "a.B", Kind: sandbox.Conflict, Subject: "s"},
		context.Canceled,
		io.ErrUnexpectedEOF,
	} {
		p := ProblemOf(err)
		back := ProblemOf(p.Err())
		if back != p {
			t.Errorf("%v:\n %+v became\n %+v", err, p, back)
		}
		if sandbox.KindOf(p.Err()) != sandbox.KindOf(err) || sandbox.HintOf(p.Err()) != sandbox.HintOf(err) {
			t.Errorf("%v became %v", err, p.Err())
		}
	}
	if p := ProblemOf(sandbox.E("node.Create", "", "", inner)); p.Detail != "no such image" || p.Subject != "nosuch" || p.Op != "node.Create" {
		t.Errorf("%+v", p)
	}
}

func TestEveryKindHasAStatusThatIsAnError(t *testing.T) {
	for _, k := range []sandbox.Kind{sandbox.Invalid, sandbox.NotFound, sandbox.Exists, sandbox.Conflict, sandbox.Unsupported, sandbox.Denied,
		sandbox.Exhausted, sandbox.Unavailable, sandbox.Timeout, sandbox.Canceled, sandbox.Internal} {
		if statusOf[k] < 400 {
			t.Errorf("%s: status %d", k, statusOf[k])
		}
	}
}

func TestAnAnswerOfSomebodyElseIsAnErrorToo(t *testing.T) {
	for status, kind := range map[int]sandbox.Kind{401: sandbox.Denied, 404: sandbox.NotFound, 418: sandbox.Invalid, 502: sandbox.Unavailable, 500: sandbox.Internal} {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "<html>", status) }))
		c, _ := NewClient(srv.URL, "k")
		_, err := c.Info(t.Context())
		if !sandbox.Is(err, kind) {
			t.Errorf("%d: %v", status, err)
		}
		srv.Close()
	}
}

func TestFilterSurvivesTheQuery(t *testing.T) {
	f := node.Filter{Team: "a b", Template: "t", All: true, States: []sandbox.State{sandbox.Running, sandbox.Paused},
		Metadata: map[string]string{"k=": "", "x": "a=b&c"}}
	delete(f.Metadata, "k=") // a key cannot hold the separator
	got, err := filterOf(filterQuery(f))
	if err != nil || !reflect.DeepEqual(got, f) {
		t.Fatalf("%+v, %v", got, err)
	}
}

func TestStreamThatBreaksOffIsAnError(t *testing.T) {
	failing := route{method: "GET", path: "/api/v1/x", serve: func(c *call) error {
		return c.stream("application/x-tar", func(w http.ResponseWriter) error {
			_, _ = io.WriteString(w, strings.Repeat("x", 1<<16))
			return errors.New("the disk is gone")
		})
	}}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = failing.serve(&call{ctx: r.Context(), w: w, r: r})
	}))
	defer srv.Close()
	c, _ := NewClient(srv.URL, "k")
	var got bytes.Buffer
	if err := c.download(t.Context(), "x", "/x", nil, &got); err == nil {
		t.Fatalf("%d bytes and no error", got.Len())
	}
}

func TestProgressEndsWithResultOrProblem(t *testing.T) {
	for name, want := range map[string]error{"result": nil, "problem": sandbox.Errorf("x.Y", sandbox.Exhausted, "disk", "full")} {
		t.Run(name, func(t *testing.T) {
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				serveProgress(r.Context(), w, func(_ context.Context, report func(int)) (string, error) {
					for i := range 3 {
						report(i)
					}
					return "done", want
				})
			}))
			defer srv.Close()
			c, _ := NewClient(srv.URL, "k")
			var seen []int
			got, err := follow[int, string](t.Context(), c, "x", "/x", nil, nil, func(i int) { seen = append(seen, i) })
			if sandbox.KindOf(err) != sandbox.KindOf(want) || want == nil && got != "done" || len(seen) != 3 {
				t.Fatalf("%q, %v, %v", got, err, seen)
			}
		})
	}
}

func TestUnknownFieldsAndTooLargeBodiesAreRefused(t *testing.T) {
	w := newWorld(t)
	for name, body := range map[string]string{
		"unknown field": `{"image":"host","imagee":1}`,
		"not JSON":      `{`,
		"too large":     `{"image":"` + strings.Repeat("a", maxBody) + `"}`,
	} {
		req, _ := http.NewRequest("POST", w.url+"/api/v1/sandboxes", strings.NewReader(body))
		req.Header.Set("Authorization", "Bearer "+w.root)
		resp := must[*http.Response](t)(http.DefaultClient.Do(req))
		if err := readProblem("x", resp); !sandbox.Is(err, sandbox.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
		resp.Body.Close()
	}
}

func TestRequestsWithoutAKeyAreRefused(t *testing.T) {
	w := newWorld(t)
	for _, rt := range routes() {
		path := strings.NewReplacer("{ref}", "x", "{port}", "1", "{template}", "x").Replace(rt.path)
		req, _ := http.NewRequest(rt.method, w.url+path, nil)
		resp := must[*http.Response](t)(http.DefaultClient.Do(req))
		resp.Body.Close()
		if resp.StatusCode != http.StatusUnauthorized {
			t.Errorf("%s %s: %d", rt.method, rt.path, resp.StatusCode)
		}
	}
}

func TestDescriptionNamesEveryRouteAndResolvesEveryReference(t *testing.T) {
	text, err := json.Marshal(describe(routes()))
	if err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Paths      map[string]map[string]struct{ OperationID string }
		Components struct{ Schemas map[string]any }
	}
	if err := json.Unmarshal(text, &doc); err != nil {
		t.Fatal(err)
	}
	ids := map[string]bool{}
	for _, rt := range routes() {
		op, ok := doc.Paths[rt.path][strings.ToLower(rt.method)]
		if !ok || ids[op.OperationID] {
			t.Errorf("%s %s: described %t, operationId %q", rt.method, rt.path, ok, op.OperationID)
		}
		ids[op.OperationID] = true
	}
	for part := range strings.SplitSeq(string(text), `"$ref":"#/components/schemas/`) {
		name, _, _ := strings.Cut(part, `"`)
		if part != string(text[:len(part)]) && doc.Components.Schemas[name] == nil {
			t.Errorf("nothing is called %q", name)
		}
	}
	for _, name := range []string{"Sandbox", "CreateRequest", "Snapshot", "Template", "Problem", "Image"} {
		if doc.Components.Schemas[name] == nil {
			t.Errorf("no schema %q", name)
		}
	}
}

func FuzzCreateRequest(f *testing.F) {
	f.Add([]byte(`{"image":"host","timeout":1000,"ports":[{"guest":80}]}`))
	f.Add([]byte(`{"lifecycle":{"onTimeout":"pause"},"policy":{"internet":true}}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		r := httptest.NewRequest("POST", "/", bytes.NewReader(body))
		var req node.CreateRequest
		if err := readJSON(r, &req); err != nil && !sandbox.Is(err, sandbox.Invalid) {
			t.Fatalf("%v", err)
		}
	})
}

func FuzzFilter(f *testing.F) {
	f.Add("state=running&metadata=a%3Db")
	f.Fuzz(func(t *testing.T, query string) {
		q, err := url.ParseQuery(query)
		if err != nil {
			return
		}
		filter, err := filterOf(q)
		if err != nil {
			return
		}
		again, err := filterOf(filterQuery(filter))
		if err != nil || !reflect.DeepEqual(again, filter) {
			t.Fatalf("%+v became %+v, %v", filter, again, err)
		}
	})
}

func FuzzProgressStream(f *testing.F) {
	f.Add([]byte("{\"progress\":1}\n\n{\"result\":\"x\"}\n"))
	f.Add([]byte("{\"problem\":{\"status\":404,\"detail\":\"x\"}}\n"))
	f.Fuzz(func(t *testing.T, stream []byte) {
		_, err := readProgress[int, string]("x", bytes.NewReader(stream), func(int) {})
		if err != nil && sandbox.KindOf(err) == "" {
			t.Fatal(err)
		}
	})
}

func TestABuildSaysOfWorkOnlyThatItWasCached(t *testing.T) {
	var said []string
	l := lineReporter{report: func(line node.LogLine) { said = append(said, line.Text) }}
	for _, step := range []image.Step{{Op: image.OpUser, Args: []string{"root"}, Text: "USER root"}, {Op: image.OpRun, Args: []string{"make"}, Text: "RUN make"}} {
		l.step(image.StepReport{Step: step, Total: 2})
		l.step(image.StepReport{Step: step, Total: 2, Done: true, Cached: true})
	}
	if got := strings.Join(said, "; "); got != "USER root; RUN make; found in the cache" {
		t.Errorf("%s", got)
	}
}
