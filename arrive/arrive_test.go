package arrive

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestWhatIsWantedIsHeardUntilAllIsThere(t *testing.T) {
	dir := t.TempDir()
	if f, err := Open(dir); f != nil || err != nil {
		t.Fatalf("nothing is on its way: %v, %v", f, err)
	}
	w, err := Make(dir)
	if err != nil {
		t.Fatal(err)
	}
	pipe, err := Open(dir)
	if err != nil || pipe == nil {
		t.Fatal(err)
	}
	defer pipe.Close()
	Ask(pipe, Want{File: strings.Repeat("x", wantSize)}) // too long a name: nobody has such a file
	for i := range 100_000 {                             // far more than fits: it does not wait
		Ask(pipe, Want{"memory1", int64(i), i%2 == 1})
	}
	for i := range 100 {
		if got, err := w.Next(); err != nil || got != (Want{"memory1", int64(i), i%2 == 1}) {
			t.Fatalf("%+v, %v", got, err)
		}
	}
	ended := make(chan error, 1)
	go func() {
		for {
			if _, err := w.Next(); err != nil {
				ended <- err
				return
			}
		}
	}()
	if err := w.Remove(); err != nil {
		t.Fatal(err)
	}
	<-ended
	if f, err := Open(dir); f != nil || err != nil {
		t.Errorf("all is there: %v, %v", f, err)
	}
	if err := os.WriteFile(filepath.Join(dir, pipeName), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); err == nil {
		t.Error("a file is taken for a pipe")
	}
}

func TestAFileIsLateUnderAllItsNamesUntilItIsWhole(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a")
	f, err := Create(path, 10_000)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	other := path + "b"
	if err := os.Link(path, other); err != nil {
		t.Fatal(err)
	}
	if late, err := Late(other); !late || err != nil {
		t.Errorf("%v, %v", late, err)
	}
	if err := Finish(f); err != nil {
		t.Fatal(err)
	}
	if late, err := Late(other); late || err != nil {
		t.Errorf("%v, %v", late, err)
	}
	if err := GiveUp(f); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(other); err != nil || info.Size() != 0 {
		t.Errorf("%v, %v", info, err)
	}
}

func FuzzWant(f *testing.F) {
	f.Add([]byte("01234567\x07\x01memory1"))
	f.Fuzz(func(t *testing.T, data []byte) {
		var b [wantSize]byte
		copy(b[:], data)
		if w := parse(b); len(w.File) > wantSize-wantHead {
			t.Errorf("%+v", w)
		}
	})
}
