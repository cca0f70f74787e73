// A program that knows nothing of proxies: go build, static, its own resolver.
package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
)

func main() {
	request, err := http.NewRequest(os.Args[1], os.Args[2], nil)
	if err != nil {
		panic(err)
	}
	client := http.Client{Transport: &http.Transport{ForceAttemptHTTP2: true}}
	response, err := client.Do(request)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	body, err := io.ReadAll(response.Body)
	if err != nil {
		panic(err)
	}
	fmt.Println(string(body))
	if response.StatusCode >= 400 {
		os.Exit(22)
	}
}
