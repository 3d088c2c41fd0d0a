package e2b

import (
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// inVolume sends a request about a volume's content.
func (s *server) inVolume(v volumeAndToken, method, what, path, more, body string) reply {
	s.t.Helper()
	return s.send(method, "/volumecontent/"+v.VolumeID+"/"+what+"?path="+url.QueryEscape(path)+more, body,
		http.Header{"Authorization": {"Bearer " + v.Token}}, "")
}

func (s *server) createVolume(name string) volumeAndToken {
	s.t.Helper()
	var v volumeAndToken
	s.want(s.do("POST", "/volumes", `{"name":"`+name+`"}`), 201).into(s.t, &v)
	return v
}

func TestVolumesBelongToATeam(t *testing.T) {
	s := newServer(t)
	v := s.createVolume("data")
	if v.VolumeID == "" || v.Token == "" || v.Name != "data" {
		t.Fatalf("%+v", v)
	}
	s.want(s.do("POST", "/volumes", `{"name":"data"}`), 400)
	s.want(s.do("POST", "/volumes", `{"name":"../data"}`), 400)
	var got volumeAndToken
	s.want(s.do("GET", "/volumes/"+v.VolumeID, ""), 200).into(t, &got)
	if got != v {
		t.Errorf("%+v", got)
	}
	if r := s.want(s.do("GET", "/volumes", ""), 200); !strings.Contains(string(r.body), v.VolumeID) || strings.Contains(string(r.body), v.Token) {
		t.Errorf("%s", r.body)
	}
	s.want(s.as(s.other, "GET", "/volumes/"+v.VolumeID, ""), 404)
	s.want(s.as(s.other, "DELETE", "/volumes/"+v.VolumeID, ""), 404)
	s.want(s.do("DELETE", "/volumes/"+v.VolumeID, ""), 204)
	s.want(s.do("DELETE", "/volumes/"+v.VolumeID, ""), 404)
	s.want(s.do("GET", "/volumes/"+v.VolumeID, ""), 404)
}

func TestFilesInVolumes(t *testing.T) {
	s := newServer(t)
	v := s.createVolume("data")
	var e volumeEntry
	s.want(s.inVolume(v, "PUT", "file", "/a.txt", "&mode=384&uid=12345", "hello"), 201).into(t, &e)
	if e.Name != "a.txt" || e.Path != "/a.txt" || e.Type != "file" || e.Size != 5 || e.Mode != 0o600 || e.UID != 12345 || e.GID != volumeGID {
		t.Errorf("%+v", e)
	}
	s.want(s.inVolume(v, "PUT", "file", "a.txt", "", "new"), 409)
	s.want(s.inVolume(v, "PUT", "file", "a.txt", "&force=true", "new"), 201)
	if r := s.want(s.inVolume(v, "GET", "file", "/a.txt", "", ""), 200); string(r.body) != "new" || r.header.Get("Content-Type") != "application/octet-stream" {
		t.Errorf("%q", r.body)
	}
	s.want(s.inVolume(v, "PUT", "file", "/empty", "", ""), 201)
	if r := s.want(s.inVolume(v, "GET", "file", "/empty", "", ""), 200); len(r.body) != 0 || r.header.Get("Content-Length") != "0" {
		t.Errorf("%q", r.body)
	}
	s.want(s.inVolume(v, "PUT", "file", "/no/dir.txt", "", "x"), 404)
	s.want(s.inVolume(v, "POST", "dir", "/d/e/f", "", ""), 404)
	s.want(s.inVolume(v, "POST", "dir", "/d/e/f", "&force=true", ""), 201)
	s.want(s.inVolume(v, "POST", "dir", "/d/e/f", "&force=true", ""), 201)
	s.want(s.inVolume(v, "POST", "dir", "/d/e/f", "", ""), 409)
	s.want(s.inVolume(v, "PUT", "file", "/d", "&force=true", "x"), 409)
	s.want(s.inVolume(v, "PATCH", "path", "/d", "", `{"uid":1001,"gid":1002,"mode":448}`), 200).into(t, &e)
	if e.UID != 1001 || e.GID != 1002 || e.Mode != 0o700 || e.Type != "directory" {
		t.Errorf("%+v", e)
	}
	for query, want := range map[string]int{"": 3, "&depth=2": 4, "&depth=3": 5} {
		var list []volumeEntry
		s.want(s.inVolume(v, "GET", "dir", "/", query, ""), 200).into(t, &list)
		if len(list) != want {
			t.Errorf("%s: %+v", query, list)
		}
	}
	for _, what := range []string{"file", "dir", "path"} {
		r := s.want(s.inVolume(v, "GET", what, "/ghost", "", ""), 404)
		var f contentError
		if r.into(t, &f); f.Code != "404" {
			t.Errorf("%s", r.body)
		}
	}
	s.want(s.inVolume(v, "GET", "dir", "/a.txt", "", ""), 404)
	s.want(s.inVolume(v, "GET", "dir", "/", "&depth=0", ""), 400)
	s.want(s.inVolume(v, "DELETE", "path", "/d", "", ""), 204)
	s.want(s.inVolume(v, "DELETE", "path", "/d", "", ""), 404)
	s.want(s.inVolume(v, "DELETE", "path", "/", "", ""), 403)
}

func TestNothingOutsideAVolumeIsReached(t *testing.T) {
	s := newServer(t)
	v, other := s.createVolume("data"), s.createVolume("other")
	record, err := s.node.GetVolume(t.Context(), "team", v.VolumeID)
	must(t, err)
	dir := s.node.VolumePath(record)
	outside := filepath.Join(t.TempDir(), "secret")
	must(t, os.WriteFile(outside, []byte("secret"), 0o644))
	must(t, os.Symlink(outside, filepath.Join(dir, "link")))
	must(t, os.Symlink(filepath.Dir(outside), filepath.Join(dir, "up")))
	for _, path := range []string{"/link", "/up/secret", "../../../../../../etc/passwd", "/../secret"} {
		if r := s.inVolume(v, "GET", "file", path, "", ""); r.status == 200 {
			t.Errorf("%s was read: %q", path, r.body)
		}
	}
	if r := s.inVolume(v, "PUT", "file", "/up/made", "&force=true", "x"); r.status == 201 {
		t.Error("a file was made outside")
	}
	if r := s.inVolume(v, "DELETE", "path", "/up/secret", "", ""); r.status == 204 {
		t.Error("a file was removed outside")
	}
	if _, err := os.Stat(outside); err != nil {
		t.Error(err)
	}
	var e volumeEntry
	s.want(s.inVolume(v, "GET", "path", "/link", "", ""), 200).into(t, &e)
	if e.Type != "symlink" || e.Target != outside {
		t.Errorf("%+v", e)
	}
	other.Token = v.Token
	s.want(s.inVolume(other, "GET", "dir", "/", "", ""), 401)
	v.Token = ""
	s.want(s.inVolume(v, "GET", "dir", "/", "", ""), 401)
	v.VolumeID = "ghost"
	s.want(s.inVolume(v, "GET", "dir", "/", "", ""), 401)
}

func TestBadPathsInVolumesAreTheClientsFault(t *testing.T) {
	s := newServer(t)
	v := s.createVolume("data")
	record, err := s.node.GetVolume(t.Context(), "team", v.VolumeID)
	must(t, err)
	dir := s.node.VolumePath(record)
	must(t, os.Symlink("/etc", filepath.Join(dir, "out")))
	must(t, os.Symlink("loop", filepath.Join(dir, "loop")))
	must(t, os.WriteFile(filepath.Join(dir, "file"), []byte("x"), 0o644))
	must(t, syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o644))
	for _, path := range []string{"/out/passwd", "/out", "/loop", "/loop/a", "/file/a", "/file/a/b", "/pipe", "/pipe/x", "/a\x00b", "/" + strings.Repeat("n", 300), "/" + strings.Repeat("a/", 3000), "/gone/x"} {
		for _, c := range []struct{ method, what, more, body string }{
			{"GET", "file", "", ""}, {"PUT", "file", "", "x"}, {"PUT", "file", "&force=true", "x"},
			{"GET", "dir", "", ""}, {"POST", "dir", "", ""}, {"POST", "dir", "&force=true", ""},
			{"GET", "path", "", ""}, {"PATCH", "path", "", `{"mode":448}`}, {"DELETE", "path", "", ""},
		} {
			if c.method == "DELETE" && strings.Count(path, "/") == 1 {
				continue // they can be removed, and are needed
			}
			if r := s.inVolume(v, c.method, c.what, path, c.more, c.body); r.status >= 500 {
				t.Errorf("%s %s %.20q: %d %s", c.method, c.what, path, r.status, r.body)
			}
		}
	}
}

func TestAVolumeHoldsNoMoreThanItsSize(t *testing.T) {
	s := newServer(t)
	v := s.createVolume("data")
	big := strings.Repeat("x", testVolumeSize/2)
	s.want(s.inVolume(v, "PUT", "file", "/one", "", big), 201)
	s.want(s.inVolume(v, "PUT", "file", "/two", "", big+big), 507)
	s.want(s.inVolume(v, "GET", "file", "/two", "", ""), 404)
	record, err := s.node.GetVolume(t.Context(), "team", v.VolumeID)
	must(t, err)
	if left, err := os.ReadDir(s.node.VolumePath(record)); err != nil || len(left) != 1 {
		t.Errorf("left in the volume: %v, %v", left, err)
	}
	// What its users put there by themselves counts, too.
	must(t, os.WriteFile(filepath.Join(s.node.VolumePath(record), "theirs"), []byte(big+big), 0o644))
	s.node.VolumeGrew(record, 2*int64(len(big))) // as the node finds out in time
	s.want(s.do("POST", "/v2/sandboxes", `{"templateID":"`+plainTemplate+`","volumeMounts":[{"name":"data","path":"/data"}]}`), 429)
}

// Files of a sandbox's root are root's here, setuid bit and all.
func TestNobodyElseReachesVolumesOnTheHost(t *testing.T) {
	s := newServer(t)
	record, err := s.node.GetVolume(t.Context(), "team", s.createVolume("data").VolumeID)
	must(t, err)
	info, err := os.Stat(filepath.Dir(s.node.VolumePath(record)))
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
}

func FuzzVolumePath(f *testing.F) {
	f.Add("/a/../../b")
	f.Fuzz(func(t *testing.T, p string) {
		got := cleanPath(p)
		if got == "" || strings.HasPrefix(got, "/") || got == ".." || strings.HasPrefix(got, "../") || strings.Contains(got, "/../") {
			t.Fatalf("%q became %q", p, got)
		}
	})
}
