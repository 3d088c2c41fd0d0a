// Package buckettest runs object stores for tests.
package buckettest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/container"
	"gocloud.dev/blob"
	_ "gocloud.dev/blob/azureblob" // azblob://
)

const (
	account = "tests"
	// startTime bounds how long the emulator takes to listen on a busy host.
	startTime = 2 * time.Minute
	// installTime bounds its download.
	installTime = 5 * time.Minute
)

var listens = regexp.MustCompile(`listens on http://(127\.0\.0\.1:\d+)`)

// Azure runs Microsoft's emulator of Azure's object store until the test ends. It returns what makes the URL of a fresh
// container. The test is skipped where the emulator cannot be had.
func Azure(t testing.TB) func() string {
	t.Helper()
	key := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte("k"), 64))
	t.Setenv("AZURE_STORAGE_ACCOUNT", account)
	t.Setenv("AZURE_STORAGE_KEY", key)
	cmd := exec.Command("node", program(t), "--blobHost", "127.0.0.1", "--blobPort", "0", "--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck")
	cmd.Dir = t.TempDir()
	cmd.Env = append(os.Environ(), "AZURITE_ACCOUNTS="+account+":"+key)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(startTime, func() { _ = cmd.Process.Kill() })
	t.Cleanup(func() {
		late.Stop()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	addr := ""
	for lines := bufio.NewScanner(out); addr == "" && lines.Scan(); {
		if m := listens.FindStringSubmatch(lines.Text()); m != nil {
			addr = m[1]
		}
	}
	if addr == "" {
		t.Fatal("the emulator ended before it listened")
	}
	late.Stop()
	go func() { _, _ = io.Copy(io.Discard, out) }() // or it would wait for somebody to read what it says
	n := 0
	return func() string {
		n++
		where := fmt.Sprintf("azblob://fresh%d?localemu=true&protocol=http&domain=%s", n, addr)
		if err := makeContainer(where); err != nil {
			t.Fatal(err)
		}
		return where
	}
}

// makeContainer makes the container of a URL.
func makeContainer(where string) error {
	ctx := context.Background()
	b, err := blob.OpenBucket(ctx, where)
	if err != nil {
		return err
	}
	defer b.Close()
	var c *container.Client
	if !b.As(&c) {
		return errors.New("it is not Azure's")
	}
	_, err = c.Create(ctx, nil)
	return err
}

// program returns the file that Node.js runs, which scripts/azurite installs.
func program(t testing.TB) string {
	t.Helper()
	_, self, _, _ := runtime.Caller(0)
	ctx, stop := context.WithTimeout(context.Background(), installTime)
	defer stop()
	var said bytes.Buffer
	cmd := exec.CommandContext(ctx, filepath.Join(filepath.Dir(self), "..", "..", "..", "scripts", "azurite"))
	cmd.Stderr, cmd.WaitDelay = &said, time.Second
	path, err := cmd.Output()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && (exit.ExitCode() == 75 || exit.ExitCode() == 77), errors.Is(ctx.Err(), context.DeadlineExceeded):
		t.Skipf("Azure's emulator is not to be had: %s", strings.TrimSpace(said.String()))
	case err != nil:
		t.Fatalf("%v: %s", err, said.String())
	}
	return strings.TrimSpace(string(path))
}
